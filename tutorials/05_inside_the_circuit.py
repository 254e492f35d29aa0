# %% [markdown]
# # Inside the circuit: the controller's state, and what became of it
#
# A controller that runs inside a model is part of its computation, so it should be open to the same tools. Here the
# signals of A-LQR are cached and patched like any activation of SmolLM2-135M, the change of a metric is split among
# the layers' controls, and followed to the heads and neurons that carry it. About a minute on two cores; no GPU.

# %%
import pandas as pd
import plotly.graph_objects as go
import torch

import steerlens as sl
from steerlens.diagnose import attribute, carriers, direct, logit_difference
from steerlens.models import smollm2

torch.set_num_threads(2)
model = smollm2()
pairs = sl.shipped("sentiment")
plant = sl.linearize(model, pairs.positive[:2], progress=False)
controller = sl.lqr(model, pairs, level=1.0, linearization=plant, progress=False)
prompts = ["The food at the restaurant was", "I saw the movie and it was", "The weather today is"]
metric = logit_difference(model, [" great", " wonderful", " delicious"], [" bad", " terrible", " awful"])
controller

# %% [markdown]
# The metric is the mean logit of three friendly next words minus that of three unfriendly ones.
#
# ## State in the cache
#
# While the controller is attached, each loop's signals are hook points, and `names_filter` finds them by name.

# %%
with sl.steer(model, controller), torch.no_grad():
    logits, cache = model.run_with_cache(prompts[0], names_filter=lambda name: "hook_steer_" in name)
print(len(cache), "signals, at layer 13:")
for name in cache:
    if name.startswith("blocks.13."):
        print(f"  {name:32} {tuple(cache[name].shape)}")
print("distance to the setpoint before block 13, by token:", cache["steer_error", 13][0])

# %% [markdown]
# NaN stands where the loop was not at work: it acts on the last token of a prompt, and on every token generated after
# it. The signals are also what a run records by itself, `run.record`, on nnsight too.
#
# ## Whose control did it?
#
# `attribute` leaves one layer's control out at a time (all in one batch, a row each) and compares the metric. The
# gradient's estimate of the same numbers, the derivative with respect to the control's strength, takes one backward
# pass for all layers together.

# %%
alone = attribute(model, controller, metric, prompts)
print(alone)
alone.plot()

# %% [markdown]
# The estimate is close to the real thing. But look at the sum: leaving out single layers explains only a small part
# of the total, and the rest stands in the title as interaction. That is feedback at work. When one control is missing,
# later loops measure the gap and fill it, so no single layer is needed much. And for some layers the metric *rises*
# when they are left out.
#
# Freeze the other controls as they were (`others="held"`), and the question is another one: how much did this vector
# do, if nobody makes up for it?

# %%
held = attribute(model, controller, metric, prompts, others="held")
print(held)
held.plot()

# %%
pd.DataFrame(
    {
        "sum over layers (logits)": [alone.total - alone.interaction, held.total - held.interaction],
        "total (logits)": [alone.total, held.total],
        "correlation of gradient and exact": [alone.correlation, held.correlation],
    },
    index=["others react", "others held"],
).round(3)

# %% [markdown]
# With the others held, the layers' effects add up to nearly the whole change. The difference between the two
# pictures is what the other loops do about a missing control.
#
# ## Patching the controller's own signal
#
# The same can be seen by hand: `blocks.L.hook_steer_u` is a hook point, so an ordinary hook may set it to zero. Here
# the control of the layer with the largest held effect is taken away, and the loops after it are watched.

# %%
layer = held.layers[int(held.effect.argmax())]
name = f"blocks.{layer}.hook_steer_u"
with sl.steer(model, controller, record="all") as run, torch.no_grad():
    whole, before = metric(model(prompts[0])), run.record.copy()
    patched = metric(model.run_with_hooks(prompts[0], fwd_hooks=[(name, lambda u, hook: 0 * u)]))
    after = run.record.copy()
effect = float(alone.effects[0, alone.layers.index(layer)])
print(f"layer {layer}: patched to zero {float(whole - patched):+.5f} logits, attribute said {effect:+.5f}")

# %%
gap = {later: float((after.layers("u")[later] - u).norm()) for later, u in before.layers("u").items() if later > layer}
figure = go.Figure(go.Bar(x=list(gap), y=list(gap.values())))
figure.update_xaxes(title_text="layer", dtick=1)
figure.update_yaxes(title_text="change of the control, |du| (activation units)")
figure.update_layout(title=f"Who steps in when layer {layer} is silent", template="simple_white", width=900, height=380)

# %% [markdown]
# A signal can also be patched with one from elsewhere. Does feedback give each prompt what *it* needs, or would
# another prompt's controls do as well? Record the controls of one prompt, and play them into another.

# %%
rows = []
with sl.steer(model, controller, record=("u", "error")) as run, torch.no_grad():
    records = []
    for prompt in prompts:
        model(prompt)
        records.append(run.record.copy())
        energy, error = records[-1].stack("u").square().sum(), records[-1].stack("error")[:, 0, -1].mean()
        print(f"{prompt:32} control energy {energy:4.0f}, mean distance to the setpoint {error:.1f}")
    for row, prompt in enumerate(prompts):
        own = float(metric(model(prompt)))
        for column, record in enumerate(records):
            hooks = []
            for donor_layer, donor in record.layers("u").items():

                def replace(u: torch.Tensor, hook: object, donor: torch.Tensor = donor) -> torch.Tensor:
                    return torch.cat([u[:, :-1], donor[:, -1:]], dim=1)

                hooks.append((f"blocks.{donor_layer}.hook_steer_u", replace))
            value = float(metric(model.run_with_hooks(prompt, fwd_hooks=hooks)))
            plain = float(alone.unsteered[row])
            rows.append({"prompt": prompt, "controls of": prompts[column], "share": (value - plain) / (own - plain)})
shares = pd.DataFrame(rows).pivot(index="prompt", columns="controls of", values="share")
shares.round(2)

# %% [markdown]
# One means: as large a change as with the prompt's own controls; the diagonal is one by construction. Borrowed
# controls work, and what differs is mostly by column: those of the weather prompt do most wherever they are played.
# Its loops saw the largest distances and pushed hardest (the numbers above the table). Three prompts of much the same
# kind are an illustration, not a result.
#
# ## Straight to the logits, or through the model?
#
# `direct` splits the change of the metric among everything that was written to the residual stream: the controls
# themselves, and what attention and MLPs wrote differently because of them. Each counts with what it does to the final
# norm and unembedding directly; the shares add up to the total, and what is left over is printed.

# %%
shares = direct(model, controller, metric, prompts)
kinds = pd.Series(shares.value.tolist(), index=pd.Index(shares.kinds, name="written by")).groupby(level=0).sum()
print(kinds.round(3).to_string())
print(f"sum {float(shares.value.sum()):+.6f}, change of the metric {float(shares.total.mean()):+.6f}")
shares.plot()

# %% [markdown]
# Most of the effect is not the vectors themselves reaching the unembedding: blocks read them and write differently.
# (A control's share here is less than its effect with the others held above, which includes what blocks made of it.)
#
# ## Which heads, which neurons?
#
# `carriers` estimates how much of the effect goes when one component alone is put back to what it did without
# steering (attribution patching), and checks the largest by doing just that.

# %%
heads = carriers(model, controller, metric, prompts, components="head", check=12)
print(f"correlation of estimate and patch over the 12 largest: {heads.correlation:.3f}")
heads.plot()

# %%
neurons = carriers(model, controller, metric, prompts, components="neuron", check=12)
print(f"correlation of estimate and patch over the 12 largest: {neurons.correlation:.3f}")
neurons.plot(count=12)

# %% [markdown]
# A few heads of late layers stand out. Only the last token was steered, so either such a head looks elsewhere than
# before, or it reads that token itself; this picture does not tell which. With an SAE of sae-lens in the place of
# `"head"`, the same call gives its features.
#
# ## What this notebook does not show
#
# Components do not add up: two heads may carry the same thing, and each then looks dispensable. A correlation near one
# says that the first-order estimate is good for *single* changes of this size, not for several at once. The metric
# is six words; whether the text gets friendlier is another question. And all numbers are means over three prompts.
