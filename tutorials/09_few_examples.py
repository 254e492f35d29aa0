# %% [markdown]
# # 9. How few examples are enough?
#
# **You will see** three methods fitted on 3, 8 and 24 pairs of texts, each at the same price, and what they do to pairs
# that none has seen, on SmolLM2-135M; then whether two sets of eight pairs agree on a direction at all. **Time:** about
# two minutes on two cores; no GPU.

# %%
import pandas as pd
import plotly.graph_objects as go

import steerlens as sl
from steerlens.evaluate import kl, neutral_loss, propensity
from steerlens.models import smollm2

model = smollm2()
dev = sl.shipped("sentiment", split="dev", read="completion")
effect = propensity(sl.shipped("sentiment", split="held_out")[:12])
print(*dev.positive[0], "|", dev.negative[0][1])

# %% [markdown]
# ## Three ideas of what an example says
#
# - **CAA**: the difference of the mean activations of the two sides.
# - **COLD-Steer** (`cold_kernel`, arXiv 2603.06495): what one step of gradient descent on the examples would do to the
#   activations. With $L$ small where the wanted completion is likelier than the unwanted one, and the kernel between the
#   prompt's parameters and an example's replaced by the identity:
#
# $$u = -\eta\,\frac{1}{N}\sum_i \nabla_x L_i$$
#
# - **SADI** (arXiv 2410.12299): scale the few heads (here), neurons or coordinates by which the two sides differ most,
#   so that what is added depends on the activation at hand, $u = \delta\,(m \odot x)$ with a mask $m$.

# %%
FITS = {
    "caa": lambda pairs: sl.caa(model, pairs, layers=15),
    "cold_kernel": lambda pairs: sl.cold_kernel(model, pairs, layers=15),
    "sadi": lambda pairs: sl.sadi(model, pairs),
}

# %% [markdown]
# ## At one price
#
# Each is scaled to a KL of 0.3 nats per token on eight prompts, and measured on twelve unseen pairs: how much likelier,
# per token, the delighted completion has become than the appalled one. Small sets are the first pairs of the large one.

# %%
numbers = [3, 8, 24]
methods = {
    # fitted when their turn comes
    f"{name}, {n}": lambda fit=fit, n=n: fit(dev[:n])
    for name, fit in FITS.items()
    for n in numbers
}
found = sl.compare(
    model,
    methods,
    effect,
    budget=kl(tokens=12) <= 0.3,
    prompts=sl.shipped_texts("prompts")[:16],
    damage=[neutral_loss()],
    baselines=("unsteered", "random"),
    seeds=3,
    max_new_tokens=12,
    progress=False,
)
table = found.table()
columns = ["strength", "effect", "low", "high", "wrong way", "KL mean"]
table[columns].round(2)

# %%
figure = go.Figure()
for shift, name in enumerate(FITS):
    part = table.loc[[f"{name}, {n}" for n in numbers]]
    bars = {
        "type": "data",
        "array": part["high"] - part["effect"],
        "arrayminus": part["effect"] - part["low"],
    }
    x = [n * 1.04**shift for n in numbers]
    figure.add_scatter(x=x, y=part["effect"], error_y=bars, name=name)
chance = float(table.loc["random", "effect"])
figure.add_hline(
    y=chance,
    line={"dash": "dash", "color": "grey", "width": 2},
    opacity=1,
    annotation_text="random",
)
figure.update_xaxes(title_text="pairs to fit on", type="log", tickvals=numbers)
figure.update_yaxes(title_text="effect (nats per token)")
figure.update_layout(
    template="simple_white",
    width=900,
    height=420,
    title="Effect on unseen pairs at equal KL",
)

# %% [markdown]
# Three pairs give the mean difference two thirds of what 24 give, and the gradient's vector a little over half; the heads that
# SADI scales do not stand out from random directions at this price, with any number of pairs. The bars are 95 %
# intervals over the twelve items. They do not contain the luck of *which* pairs were taken to fit on,
# and that is the larger part with few of them, as the next table shows.
#
# ## Do two sets of eight agree?
#
# Cosines of the vectors from three disjoint sets of eight pairs. In 576 dimensions two random directions have about 0.04.

# %%
parts = [dev[:8], dev[8:16], dev[16:24]]
print("sadi acts at:")
for part in parts:
    print("   ", *sorted(str(loop.act) for loop in FITS["sadi"](part).loops))
rows = {}
for name in ("caa", "cold_kernel"):
    vectors = [FITS[name](part).loops[0].law.vector for part in parts]
    vectors = [v / v.norm() for v in vectors]
    rows[name] = {
        # of unit vectors, so a cosine
        f"{a + 1} and {b + 1}": float(vectors[a] @ vectors[b])
        for a, b in ((0, 1), (0, 2), (1, 2))
    }
pd.DataFrame(rows).T.round(2)

# %% [markdown]
# A direction that changes with the examples holds their topics as much as their tone. Pairs of the same prompt with two
# completions, as here, keep some of the topic out.
#
# ## What was not shown
#
# `cold_fd`, COLD-Steer's estimate with the parameters' own gradient, which is recomputed for every prompt: how it differs
# from the kernel, and how far a first-order step reaches, is in
# [a notebook of its own](../reproductions/cold_and_sadi.ipynb). SADI's and COLD-Steer's papers report gains on
# multiple-choice questions with models of 7 billion parameters; a model of 135 million answers those at chance. One
# behaviour and twelve items rank no methods.
