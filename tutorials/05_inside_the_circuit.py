# %% [markdown]
# # 5. Inside the circuit: what became of a control
#
# A controller that runs inside a model is part of its computation, so it is open to the same tools. **You will see** the
# signals of A-LQR cached and patched like any activation of SmolLM2-135M, the change of a metric split among the layers'
# controls, and the heads that carry it. **Time:** about half a minute on two cores; no GPU.

# %%
import pandas as pd
import plotly.graph_objects as go
import torch

import steerlens as sl
from steerlens.diagnose import attribute, carriers, direct, logit_difference
from steerlens.models import smollm2

model = smollm2()
pairs = sl.shipped("sentiment", split="dev", read="completion")
controller = sl.lqr(model, pairs, linearize_on=2, progress=False)
prompts = [
    "The food at the restaurant was",
    "I saw the movie and it was",
    "The weather today is",
]
metric = logit_difference(
    model,
    [" great", " wonderful", " delicious"],
    [" bad", " terrible", " awful"],
)
controller

# %% [markdown]
# The metric $M$ is the mean logit of three friendly next words minus that of three unfriendly ones.
#
# ## State in the cache
#
# While the controller is attached, each loop's signals are hook points, and `names_filter` finds them by name.

# %%
with sl.steer(model, controller), torch.no_grad():
    logits, cache = model.run_with_cache(
        prompts[0],
        names_filter=lambda name: "hook_steer_" in name,
    )
print(len(cache), "signals, at layer 13:")
for name in cache:
    if name.startswith("blocks.13."):
        print(f"  {name:32} {tuple(cache[name].shape)}")
print(
    "distance to the setpoint before block 13, by token:",
    cache["steer_error", 13][0],
)

# %% [markdown]
# NaN stands where the loop was not at work: it acts on the last token of a prompt, and on every token generated after
# it. The signals are also what a run records by itself, `run.record`, on nnsight too.
#
# ## Whose control did it?
#
# Leave out the control of one layer at a time (all in one batch, a row each) and look at the metric:
#
# $$\Delta_t = M(u_1, \dots, u_T) - M(\dots, u_t = 0, \dots)$$
#
# The other loops measure, and react. The gradient's estimate of the same numbers takes one backward pass.

# %%
alone = attribute(model, controller, metric, prompts)
print(alone)
alone.plot()

# %% [markdown]
# Now freeze the other controls as they were (`others="held"`): how much did this vector do, if nobody makes up for it?

# %%
held = attribute(model, controller, metric, prompts, others="held")
held.plot()

# %%
pd.DataFrame(
    {
        "sum over layers (logits)": [
            alone.total - alone.interaction,
            held.total - held.interaction,
        ],
        "total (logits)": [alone.total, held.total],
        "correlation of gradient and exact": [
            alone.correlation,
            held.correlation,
        ],
    },
    index=["others react", "others held"],
).round(3)

# %% [markdown]
# With the others held, the effects of the layers add up to the whole change, to six percent of it. While the others
# react, a quarter is missing, and that is feedback at work: when one control is left out, later loops measure the gap and
# fill some of it. By default the gains are small; larger ones, such as the paper's (`paper=True`), fill more.
# So "which layer matters?" has two answers, and an ablation of one layer gives the first.
#
# ## Patching the controller's own signal
#
# The same by hand: `blocks.L.hook_steer_u` is a hook point, so an ordinary hook may set it to zero. Of the first twenty
# layers, the control of the one with the largest held effect is taken away, and the loops after it are watched.

# %%
layer = held.layers[int(held.effect[:20].argmax())]
name = f"blocks.{layer}.hook_steer_u"
with sl.steer(model, controller, record="all") as run, torch.no_grad():
    whole, before = metric(model(prompts[0])), run.record.copy()
    patched = metric(
        model.run_with_hooks(
            prompts[0],
            fwd_hooks=[(name, lambda u, hook: 0 * u)],
        ),
    )
    after = run.record.copy()
effect = float(alone.effects[0, alone.layers.index(layer)])
print(
    f"layer {layer}: patched to zero {float(whole - patched):+.5f} logits,",
    f"attribute said {effect:+.5f}",
)

# %%
gap = {
    # norm of the change of each later control
    later: float((after.layers("u")[later] - u).norm())
    for later, u in before.layers("u").items()
    if later > layer
}
figure = go.Figure(go.Bar(x=list(gap), y=list(gap.values())))
figure.update_xaxes(title_text="layer", dtick=1)
figure.update_yaxes(title_text="|change of u| (activation units)")
figure.update_layout(
    title=f"Who steps in when layer {layer} is silent",
    template="simple_white",
    width=900,
    height=380,
)

# %% [markdown]
# ## Straight to the logits, or through the model?
#
# `direct` splits the change of the metric among everything that was written to the residual stream: the controls
# themselves, and what attention and MLPs wrote differently because of them. Each counts with what it does to the final
# norm and unembedding directly; the shares add up to the total.

# %%
shares = direct(model, controller, metric, prompts)
kinds = (
    pd.Series(
        shares.value.tolist(),
        index=pd.Index(shares.kinds, name="written by"),
    )
    .groupby(level=0)
    .sum()
)
print(kinds.round(3).to_string())
print(
    f"sum {float(shares.value.sum()):+.6f},",
    f"change of the metric {float(shares.total.mean()):+.6f}",
)

# %% [markdown]
# ## Which heads?
#
# `carriers` estimates how much of the effect goes when one component alone is put back to what it did without steering
# (attribution patching), and checks the largest by doing just that. With `"neuron"` or an autoencoder of sae-lens
# instead of `"head"`, the same call ranks neurons or features.

# %%
heads = carriers(model, controller, metric, prompts, components="head", check=8)
print(
    "correlation of estimate and patch over the 8 largest:",
    f"{heads.correlation:.3f}",
)
heads.plot()

# %% [markdown]
# ## What was not shown
#
# Components do not add up: two heads may carry the same thing, and each then looks dispensable. A correlation near one
# says that the first-order estimate is good for *single* changes of this size, not for several at once. The metric is
# six words; whether the text gets friendlier is another question, and [tutorial 3](03_layer_and_strength.ipynb)'s. All
# numbers are means over three prompts.
