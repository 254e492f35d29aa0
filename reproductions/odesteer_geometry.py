# %% [markdown]
# # Flows: ODESteer, the sphere, and why one step nearly suffices
#
# ODESteer (arXiv 2602.17560) does not add a vector: it follows a field. A classifier tells positive from negative
# activations, and the state moves along the gradient of its log-odds. You will see on SmolLM2-135M that this motion
# stays on a sphere, that it hardly bends, what ten Euler steps do to the norm, and what it costs to write the
# classifier with random features, as the paper does. About a minute on two cores; no GPU.

# %%
import pandas as pd
import plotly.graph_objects as go
import torch

import steerlens as sl
from steerlens.fit.reading import contrast_states
from steerlens.flow.barriers import exact_barrier, sketched_barrier, truncate
from steerlens.flow.flows import angle
from steerlens.flow.sketch import TensorSketch
from steerlens.hosts import host_of
from steerlens.models import smollm2

torch.set_num_threads(2)
model = smollm2()
pairs, held_out = sl.shipped("sentiment")[:32], sl.shipped("sentiment")[32:]
site = sl.Site(15)
positive, negative = (side.double() for side in contrast_states(host_of(model), pairs, [site])[site])
x = contrast_states(host_of(model), held_out, [site])[site][1].double()
print(f"{len(positive)} + {len(negative)} texts to fit, {len(x)} held-out negative states, d = {x.shape[1]}")

# %% [markdown]
# ## The barrier and its field
#
# `exact_barrier` is a logistic regression on the kernel (0.1 <u, u'> + 1)^2 of the activations' *directions*
# u = x / |x|. It depends on the direction alone, so its gradient is orthogonal to x: whoever follows it stays on the
# sphere of radius |x|. For degree 2 the barrier is a quadratic form u'Au + b'u + k, and with the paper's constants the
# linear part dominates it.

# %%
barrier = exact_barrier(positive, negative)
v = barrier.velocity(x)
linear = truncate(barrier, 0)
print("largest cosine of the field with x itself:   ", f"{(v * x).sum(1).abs().div(x.norm(dim=1)).max():.1e}")
print("cosine of the field with that of b'u alone:  ", f"{torch.cosine_similarity(v, linear.velocity(x)).min():.5f}")
difference = positive.mean(0) - negative.mean(0)
tangent = difference - (x @ difference)[:, None] * x / x.norm(dim=1, keepdim=True) ** 2
print("cosine with CAA's vector on the tangent plane:", f"{torch.cosine_similarity(v, tangent).min():.4f}")

# %% [markdown]
# The third line is worth a pause. With these constants and this many texts, ODESteer's field is the mean difference
# of the two sides, projected on the sphere. What the method adds to CAA here is the sphere.
#
# ## The exact flow, and what solvers make of it
#
# A field that is the projection of a fixed vector has the great circle towards that vector as its flow, in closed
# form. Here are several solvers against the flow itself (200 Runge-Kutta steps), for held-out negative states and
# flows of growing length. Lengths are angles: 0.3 rad moves the state by 0.3 |x|.

# %%
SOLVERS = {
    "Euler, 1 step": (barrier, {"solver": "euler", "steps": 1}),
    "Euler, 10 steps (the paper)": (barrier, {"solver": "euler", "steps": 10}),
    "great circle of b (closed form)": (linear, {"solver": "circle"}),
    "Runge-Kutta, 1 step, rank 8 (default)": (truncate(barrier, 8), {"solver": "rk4", "steps": 1}),
}
lengths = [0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2]


def move(field, length, **options):
    return x + sl.Flow(field, length, **options).act(x, sl.Now())[0]


rows = []
for length in lengths:
    exact = move(barrier, length, solver="rk4", steps=200)
    for name, (field, options) in SOLVERS.items():
        end = move(field, length, **options)
        rows.append(
            {
                "solver": name,
                "length (rad)": length,
                "off course (degrees)": float(torch.rad2deg(angle(end, exact)).max()),
                "norm": float((end.norm(dim=1) / x.norm(dim=1)).max()),
            }
        )
errors = pd.DataFrame(rows)

# %%
figure = go.Figure()
for name, part in errors.groupby("solver", sort=False):
    figure.add_scatter(x=part["length (rad)"], y=part["off course (degrees)"], name=name, mode="lines+markers")
figure.update_xaxes(title_text="length of the flow (rad)")
figure.update_yaxes(title_text="angle from the exact flow's end (degrees), worst state", type="log")
figure.update_layout(title="How far off course", template="simple_white", width=900, height=420)

# %%
errors.pivot(index="length (rad)", columns="solver", values="norm").loc[:, list(SOLVERS)].round(4)

# %% [markdown]
# Read both together. At 0.3 rad, 17 degrees, nobody is off course by much: even a single Euler step ends half a degree
# from the right *direction*, since the field hardly turns along the way, and ten steps 0.04 degrees. What Euler gets
# wrong is the norm, and by a known amount, |x(T)|^2 = |x|^2 + T^2 / steps, because each step leaves the sphere along
# its tangent. The next block's layer norm does not see that, which may be why the paper's one-step variant scores
# nearly as well as ten steps. The great circle, which leaves the quadratic part of the barrier out, is 0.03 degrees
# away; the default, one Runge-Kutta step in ten coordinates, 0.001 degrees, with 4 evaluations of the field instead
# of 10. Only well beyond 0.5 rad, where a small model's text falls apart, do the steps matter.
#
# ## What the flow gains
#
# The barrier along the way, as log-odds. It is bounded: on a sphere no flow gets past the barrier's maximum, so "the
# state reaches the positive region" is nothing the method can promise. Look at where the curves end.

# %%
figure = go.Figure()
steps = torch.linspace(0, 1.6, 17).tolist()
for row in range(4):
    levels = [float(barrier.value(move(barrier, length, steps=8)[row])) for length in steps]
    figure.add_scatter(x=steps, y=levels, name=f"held-out state {row}", mode="lines+markers")
figure.add_hline(y=0, line={"dash": "dot", "color": "black", "width": 2}, opacity=1, annotation_text="even odds")
figure.update_xaxes(title_text="length of the flow (rad)")
figure.update_yaxes(title_text="barrier h (logit)")
figure.update_layout(title="The log-density ratio along the flow", template="simple_white", width=900, height=420)

# %% [markdown]
# All end at one height, the maximum on the sphere. And the scale of the axis says that these logits are no
# probabilities: on unit vectors, with C = 1, the regression is shrunk almost to nothing. The *direction* of its gradient
# is what counts.
#
# ## What the sketch costs
#
# The paper does not use the kernel but a tensor sketch of it: n random features whose inner product is the kernel on
# average. For degree 2 the sketched classifier is a quadratic form too, so that both can be compared exactly. The
# noise of the sketch has no reason to lie in the span of the texts.

# %%
rows = []
for n in (500, 2000, 8000):
    for seed in range(2):
        sketch = TensorSketch.draw(x.shape[1], components=n, seed=seed)
        cosine = torch.cosine_similarity(sketched_barrier(positive, negative, sketch).velocity(x), v).mean()
        law = (1 + 1.2 * x.shape[1] / n) ** -0.5
        rows.append({"features n": n, "seed": seed, "cosine with the exact field": float(cosine), "rule": law})
        rows[-1]["squared length that is noise"] = 1 - rows[-1]["cosine with the exact field"] ** 2
pd.DataFrame(rows).set_index(["features n", "seed"]).round(3)

# %% [markdown]
# The rule is cos^2 = 1 / (1 + 1.2 d / n), fitted to this and other data. At d = 4096 and the paper's n = 8000 it says
# that more than a third of the squared displacement is random. The kernel itself needs no sketch: 64 texts span 64
# dimensions, and the flow never leaves them and x.
#
# ## On the model
#
# The same angle three ways: along the exact field, along the paper's sketched field, and along a random direction on the
# sphere, which shows what turning the state costs by itself. KL is the divergence of the next token's distribution from
# the unsteered one; the rise is that of the *exact* barrier. Both are means over four prompts.

# %%
prompts = ["The film was", "I went to the new restaurant and", "My weekend was", "The hotel room was"]
length = 0.3
sketch = TensorSketch.draw(x.shape[1], components=8000, seed=0)
toward = torch.randn(x.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
flows = {
    "exact kernel": sl.Flow(truncate(barrier, 8), length),
    "sketch, 10 Euler steps": sl.Flow(sketched_barrier(positive, negative, sketch), length, solver="euler", steps=10),
    "random direction": sl.Flow(truncate(exact_barrier(positive + toward, positive - toward), 0), length),
}
with torch.no_grad():
    plain = [model(prompt)[0, -1].log_softmax(-1) for prompt in prompts]
rows = []
for name, flow in flows.items():
    row = {"flow": name, "angle (rad)": 0.0, "KL (nats)": 0.0, "rise (logit)": 0.0}
    for prompt, logits in zip(prompts, plain, strict=True):
        with sl.steer(model, sl.Controller([sl.Loop(flow, site)]), record="all") as run, torch.no_grad():
            _, cache = model.run_with_cache(prompt)
            steered = model(prompt)[0, -1].log_softmax(-1)
        end = cache[str(site)][0, -1].double()
        start = end - run.record.stack("u")[0, 0, -1].double()
        row["angle (rad)"] += float(run.record.stack("angle_rad")[0, 0, -1]) / len(prompts)
        row["KL (nats)"] += float((steered.exp() * (steered - logits)).sum()) / len(prompts)
        row["rise (logit)"] += float(barrier.value(end) - barrier.value(start)) / len(prompts)
    rows.append(row)
pd.DataFrame(rows).set_index("flow").round(3)

# %% [markdown]
# At this width and n = 8000 the sketch costs little: 96 % of the rise. A random direction turns the state as far, moves
# the output by more than half as much, and leaves the barrier where it was. KL alone is no measure of steering.

# %%
controller = sl.odesteer(model, pairs, layers=site.layer, angle_rad=0.3)
for prompt in prompts[:2]:
    print("unsteered:", model.generate(prompt, max_new_tokens=20, do_sample=False, verbose=False))
    with sl.steer(model, controller) as run:
        print("0.3 rad:  ", model.generate(prompt, max_new_tokens=20, do_sample=False, verbose=False))
    before, after = run.record.stack("barrier_before")[0, 0], run.record.stack("barrier_after")[0, 0]
    print(f"barrier, mean over the steered tokens: {before.nanmean():+.4f} before, {after.nanmean():+.4f} after\n")

# %% [markdown]
# The barrier rises at every steered token; that is arithmetic, not success.
#
# ## What this notebook does not show
#
# That ODESteer steers better than adding a vector. The paper reports large gains in truthfulness, helpfulness and
# detoxification for models of 7 to 9 billion parameters, judged by other large models. None of that can be measured
# here: with a model of 135 million parameters the score of such a judge says more about fluency than about the method,
# differences between methods at equal divergence are smaller than the spread over prompts, and the 32 pairs used here
# are far from the paper's thousands, with which the quadratic part of the barrier may matter more. Four prompts and one
# random direction are an illustration, no ablation. What carries over is geometry: the sphere, the bend of the flow,
# the Euler steps' norm, and the noise of the sketch, whose rule should be checked again at the width of your model.
