# %% [markdown]
# # Closed loop: when can feedback be trusted?
#
# A-LQR (arXiv 2604.19018) takes the blocks of a language model for a plant, linearises them, and designs feedback
# for the linear model. Here you test each step of that on SmolLM2-135M: what feedback buys over adding a fixed
# vector of the same size, how linear the blocks are, how well the linear model predicts the steered token, and
# what the weights q and r trade. One to two minutes on two cores; no GPU.

# %%
import pandas as pd
import plotly.graph_objects as go
import torch

import steerlens as sl
from steerlens.diagnose import closed_loop, linearity, tracking
from steerlens.models import smollm2

torch.set_num_threads(2)
model = smollm2()
pairs = sl.shipped("sentiment")
prompts = [
    "I went to the new restaurant last night and",
    "The package arrived on Monday and",
    "My neighbour has a dog that",
    "We took the train to the coast because",
]
prompt = prompts[0]
plant = sl.linearize(model, pairs.positive[:2], progress=False)
controller = sl.lqr(model, pairs, paper=True, linearization=plant, full_gain=True)
controller

# %% [markdown]
# ## Open loop against closed loop, at the same energy
#
# The loop measures the distance to its setpoint before each block and adds a control after it. An open loop adds
# a fixed vector to every token alike. To compare fairly, the open loop gets, for each prompt, the *average*
# control that the closed loop used on the *other* prompts, scaled until its energy (the sum of |u|^2 over the
# layers) is what the closed loop spent on this prompt. So it knows where and how much to push on average; it only
# cannot look.
#
# The errors are in units of the distance mu between the two classes at each layer; the table has their median
# over the layers. A mean would show layers 1 and 3 only, where the two classes are so close that every state is
# many mu away.


# %%
def last_token(controller: sl.Controller, prompt: str) -> sl.Record:
    with sl.steer(model, controller, record="all") as run, torch.no_grad():
        model(prompt)
    return run.record


mu = torch.tensor(controller.recipe["found"]["mu"])[controller.layers]


def error(record: sl.Record) -> torch.Tensor:
    return record.stack("error")[:, 0, -1] / mu


def median(values: torch.Tensor) -> float:
    return float(values.median())


closed = [last_token(controller, each) for each in prompts]
controls = torch.stack([record.stack("u")[:, 0, -1] for record in closed])  # [prompt layer d]
rows = []
for index, (each, record) in enumerate(zip(prompts, closed, strict=True)):
    mean = torch.cat([controls[:index], controls[index + 1 :]]).mean(0)
    mean = mean * (controls[index].norm() / mean.norm())
    sites = [sl.Site(t, "resid_post") for t in controller.layers]
    fixed = sl.Controller([sl.Loop(sl.Add(u), site, where="last") for u, site in zip(mean, sites, strict=True)])
    # a loop of strength 0 measures and adds nothing
    opened = last_token(fixed + controller * 0, each)
    base = last_token(controller * 0, each)
    rows.append({"prompt": each, "unsteered": error(base), "open loop": error(opened), "closed loop": error(record)})
table = pd.DataFrame([{name: x if name == "prompt" else median(x) for name, x in row.items()} for row in rows])
table.set_index("prompt").round(2)

# %%
figure = go.Figure()
for name in ("unsteered", "open loop", "closed loop"):
    values = torch.stack([row[name] for row in rows]).mean(0)
    figure.add_scatter(x=controller.layers, y=values.tolist(), name=name, mode="lines+markers")
figure.update_xaxes(title_text="layer")
figure.update_yaxes(title_text="distance to the setpoint (units of mu), mean over prompts", type="log")
figure.update_layout(title="The same energy, with and without looking", template="simple_white", width=900, height=420)

# %% [markdown]
# A fixed vector is a strong competitor: most of the distance is common to all prompts, and until about layer 24
# the two curves lie on each other. Feedback shows at the last layers, where it corrects what earlier controls
# have left over.
# By the median over the layers the open loop is even ahead on three of the four prompts.
# This is one setpoint, four prompts and one token; with an open loop tuned on prompts of another
# kind, or over a long generation, the comparison may come out differently. Neither loop gets to its setpoint:
# control has a price.
#
# ## How linear are the blocks?
#
# The gains come from a linear model. `linearity` perturbs the state before block 1 in random directions, by a
# fraction of its own norm, sends it through the blocks themselves, and compares with the product of their
# Jacobians. An error of 1 means that the prediction is no better than predicting no change at all.

# %%
own = linearity(model, [prompt, pairs.positive[0]], directions=4, progress=False)
own.plot("path")

# %% [markdown]
# For one percent of the norm the prediction is right to a few percent through all 29 blocks; the error grows in
# proportion, as it must for a tangent, and at the size of the state itself nothing is left of it. Steering is not
# small: the later cells show where on this scale it lies.
#
# The controller, however, was not linearised at this prompt but at two other texts, which end in a full stop. How
# much do the Jacobians of one text have to do with those of another? Their leading outputs are compared here, and
# a random pair of matrices for scale.

# %%
own.plot("similarity")

# %%
borrowed = linearity(model, [prompt], directions=4, linearization=plant, progress=False)
pd.DataFrame(
    {"own Jacobians": own.path[:, -1], "Jacobians of other texts": borrowed.path[:, -1]},
    index=pd.Index(own.sizes, name="size of the perturbation (fraction of |x|)"),
).round(3)

# %% [markdown]
# Far above random and far below one: the outputs of a block are much alike for two texts, its details are not.
# And where directions are random, the Jacobians of other texts predict nothing: their error is above 1 even for
# the smallest push, and does not depend on its size. The paper's recipe, averaged Jacobians of some texts, is a
# model of the blocks on those texts.
#
# ## Tracking error: predicted, actual, bounded
#
# `tracking` sends the last token of the prompt through the blocks with the loop closed, and through the linear
# model with the loop closed. First with the linear model that the controller was designed on.

# %%
designed = tracking(model, prompt, controller=controller, linearization=plant, record=closed[0], bound=False)
designed.plot()

# %% [markdown]
# And yet the feature error, which is all that the loop looks at, is predicted well for most of the depth: dashed
# and solid line stay together while the distance shrinks, although most of the *state* is predicted wrongly (the
# column `state_error` of the table is around 1). What the loop adds lies along the direction it measures, and the
# blocks carry that direction along in much the same way for every text. The last layers are where the prediction
# is worst.
#
# The bound needs no more than the curvature of the blocks along the way (the largest ratio of remainder to
# squared deviation seen) and the Jacobians of the closed loop. Here it is for the prompt's own Jacobians and a
# tenth of the control.

# %%
weak = tracking(model, prompt, controller=controller * 0.1)
weak.plot()

# %%
pd.DataFrame(
    {
        "without control": (weak.actual - weak.unsteered).abs(),
        "linear model": (weak.actual - weak.predicted).abs(),
        "bound on it": weak.bound,
    },
    index=pd.Index(weak.layers, name="layer"),
).iloc[[2, 5, 10, 15, 20, 25, 28]].round(3)

# %% [markdown]
# With its own Jacobians and a small control the linear model explains nearly all that the control does, and the
# bound holds, some tens of times above the error: it assumes that all remainders conspire. At full control it
# holds as well and says little (`tracking(model, prompt, controller=controller)`): it then exceeds the distance
# itself. The bound is a posteriori, with the curvature seen along this very path. It promises nothing for another
# text.
#
# ## Gains and closed loop
#
# `closed_loop` tells how strong the gains are, and what the regulator expects to pay against what the token did
# pay.

# %%
loop = closed_loop(controller, linearization=plant, along=designed)
loop.plot()

# %%
loop.table().loc[[1, 10, 20, 29]].round(3)

# %% [markdown]
# The whole gain is around 1, what a single direction gets of it around 0.3: the loop removes about a third of the
# error it sees at each layer. Blocks that stretch some directions several times are not made contractive by this
# in the ordinary norm; in norms that look ahead every step contracts, by construction, and the figure to read is
# how little. The realised cost is many times the predicted one, and rightly so: the regulator assumes that an
# error, once removed, stays away, while here the blocks bring in new error at every layer. On an exactly linear
# plant with feedback of the whole state the two are equal, which the tests of steerlens check to ten digits.
#
# ## What q and r trade
#
# Only the ratios of the weights matter. A large r makes control expensive: less energy, more error. The
# linearization is at hand, so each point costs seconds, most of them for reading the texts again. The divergence of
# the next token's distribution from the unsteered one stands beside each point: it is what the user pays, and no
# term of the regulator's cost.

# %%
with torch.no_grad():
    plain = [model(each)[0, -1].log_softmax(-1) for each in prompts]
points = []
for r in (0.1, 1.0, 10.0):
    # the defaults are q = 0.1, r = 1: the controller at hand
    candidate = controller if r == 1.0 else sl.lqr(model, pairs, paper=True, r=r, linearization=plant)
    energy, missed, divergence = [], [], []
    for each, logits in zip(prompts, plain, strict=True):
        with sl.steer(model, candidate) as run, torch.no_grad():
            steered = model(each)[0, -1].log_softmax(-1)
        energy.append(float(run.record.stack("u_norm")[:, 0, -1].square().sum()))
        missed.append(error(run.record))
        divergence.append(float((steered.exp() * (steered - logits)).sum()))
    points.append(
        {
            "r / q": r / 0.1,
            "energy": sum(energy) / len(energy),
            "error (mu)": median(torch.stack(missed)),
            "KL (nats)": sum(divergence) / len(divergence),
        }
    )
sweep = pd.DataFrame(points).set_index("r / q")
sweep.round(2)

# %%
labels = [f"r/q = {ratio:g}, KL {kl:.2f}" for ratio, kl in zip(sweep.index, sweep["KL (nats)"], strict=True)]
figure = go.Figure(
    go.Scatter(
        x=sweep["energy"], y=sweep["error (mu)"], text=labels, mode="lines+markers+text", textposition="top right"
    )
)
figure.update_xaxes(title_text="control energy, sum of |u|^2 (squared activation units), mean over prompts", type="log")
figure.update_yaxes(title_text="distance to the setpoint (units of mu), median")
figure.update_layout(title="What r buys", template="simple_white", width=900, height=420)

# %% [markdown]
# From left to right r falls: more energy for less and less. How far to go is a matter of what it does to the
# text, which the divergence hints at and the regulator does not know.
#
# ## What this notebook does not show
#
# Whether the text gets better: no continuation was read here, let alone judged. Whether any of this holds for
# another model, another feature, or a token late in a generation, whose context is steered too. And the test of
# linearity uses random directions from the residual stream's whole space, of which a text's own states fill a
# small part.
