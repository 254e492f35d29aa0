# %% [markdown]
# # 10. Your own law, and your own method
#
# **You will see** a control law in ten lines that the library does not have, at work in SmolLM2-135M, and the same as a
# method that the conformance suite checks on two host libraries. **Time:** about a minute on two cores; no GPU.

# %%
import plotly.graph_objects as go
import torch

import steerlens as sl
from steerlens import testing
from steerlens.fit.card import Card
from steerlens.fit.method import method
from steerlens.fit.reading import contrast_states, pick_layers
from steerlens.models import smollm2

# %% [markdown]
# ## A law
#
# A steering method is a control $u(x)$ that is added to the state $x$. Here is one that acts only when it must: a
# ceiling on the state's component along a unit direction $v$,
#
# $$u = \min(m - \langle v, x\rangle,\ 0)\;v .$$
#
# A law holds tensors and one pure function. It sees `x` as `[batch pos d]` in float32, and knows neither the layer, nor
# the library, nor which tokens are pads; others take care of that. What it reports beside the control are functions,
# called only if somebody looks.


# %%
class Ceiling(sl.Law):
    """Keep `<v, x>` at or below a bound."""

    signals = ("projection", "excess")

    def __init__(self, v: torch.Tensor, most: torch.Tensor):
        self.v, self.most = v, most

    def act(self, x, now):
        projection = (x * self.v).sum(-1)
        excess = (projection - self.most).clamp(min=0)
        return -excess[..., None] * self.v, {
            "projection": lambda: projection,
            "excess": lambda: excess,
        }


# %% [markdown]
# ## At work
#
# A direction of delight, from the mean difference of delighted and appalled texts, as in
# [the quickstart](01_quickstart.ipynb). A `Loop` says where the law acts and on which tokens; a `Controller` is a list of
# loops.

# %%
model = smollm2()
pairs = sl.shipped("sentiment", split="dev", read="completion")
v = sl.caa(model, pairs, layers=15).loops[0].law.vector
v, most = v / v.norm(), torch.tensor(5.0)
ceiling = sl.Controller([sl.Loop(Ceiling(v, most), 15, where="all")])

text = "The food was wonderful, the waiters friendly, but our room was cold."
with sl.steer(model, ceiling) as run, torch.no_grad():
    model(text)
before = run.record.layers("projection")[15][0]
after = before - run.record.layers("excess")[15][0]
tokens = model.to_str_tokens(text)
tokens = [f"{index} {token}" for index, token in enumerate(tokens)]
figure = go.Figure()
figure.add_scatter(x=tokens, y=before.tolist(), name="without the ceiling")
figure.add_scatter(x=tokens, y=after.tolist(), name="with it")
figure.update_traces(mode="lines+markers")
figure.add_hline(
    y=float(most),
    line={"dash": "dash", "color": "black", "width": 2},
    opacity=1,
)
figure.update_xaxes(title_text="token")
figure.update_yaxes(title_text="⟨v, x⟩ (activation units)")
figure.update_layout(
    template="simple_white",
    width=900,
    height=460,
    title="Component along 'delight', after block 15",
)

# %% [markdown]
# Where the component is below the dashed line nothing is done; above it, it is cut. Token 0 is missing: many models keep
# an activation a hundred times larger there, and the named positions leave it alone.
#
# A file names laws by class name and holds no code, so whoever loads it says which class that is.

# %%
ceiling.save("ceiling.safetensors")
print(sl.Controller.load("ceiling.safetensors", laws=[Ceiling]))

# %% [markdown]
# ## A method
#
# A method is a function from a model and data to a controller. The decorator checks options and data, finds the host of
# the model, and writes the recipe; the card says what the method needs. `model` in the body is that host, so the same
# lines fit on TransformerLens, on nnsight and on a server.


# %%
@method(card=Card(needs="sets", points=("resid_post",)))
def capped(
    model,
    data,
    *,
    quantile=0.5,
    layers=None,
    strength=1.0,
    where="all",
):
    """Cap the component along the mean difference of two sets of texts.

        u = strength min(m - <v, x>, 0) v
        v = d / |d|,   d = mean x+ - mean x-

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model.
        data: Contrast texts.
        quantile: The bound m is this quantile of `<v, x>` on the negative
            texts.
        layers: Default the middle layer.
        strength: Factor, no unit.
        where: Token positions, see `Loop`.

    Returns:
        One loop per layer. Recorded signals: `projection` and `excess`,
        both `[batch pos]`, in activation units; `u`; `u_norm`.

    Raises:
        ValueError: a quantile outside of 0 to 1.

    Source: the idea of activation capping (arXiv 2601.10387), not its data
    or code.
    """
    loops = []
    sites = pick_layers(model, layers, "resid_post", default="middle")
    states = contrast_states(model, data, sites)
    for site, (positive, negative) in states.items():
        v = positive.mean(0) - negative.mean(0)
        v = v / v.norm()
        law = Ceiling(v, torch.quantile(negative @ v, quantile))
        loops.append(sl.Loop(law, site, where=where, strength=strength))
    return sl.Controller(loops)


controller = capped(model, pairs, layers=[14, 15, 16])
prompt = "The best thing about the hotel was"
options = {"max_new_tokens": 20, "do_sample": False, "verbose": False}
print(model.generate(prompt, **options))
with sl.steer(model, controller):
    print(model.generate(prompt, **options))

# %% [markdown]
# ## Does it keep the promises?
#
# The suite that every method of steerlens passes takes yours too: equal logits on both libraries, strength 0 is bit for
# bit off, a batch row equals the row alone, KV cache on equals off, nothing is left behind, and others. It runs on tiny
# random models, and checks the card and the docstring as well.

# %%
for host in ("bridge", "nnsight"):
    case = testing.Case(capped, host)
    for check in testing.checks():
        testing.run_check(check, case)
    print(f"{host}: {len(testing.checks())} checks passed")

# %% [markdown]
# ## What was not shown
#
# Whether a ceiling is a good idea: the two continuations are an illustration. Setpoints with feedback gains, memory from
# layer to layer, gates and second passes are laws too; `CONTRIBUTING.md` says how to add a method to the library, and
# the laws in `steerlens/laws` are short.
