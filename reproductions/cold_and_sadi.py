# %% [markdown]
# # Few examples: COLD-Steer and SADI from ten pairs
#
# Ten polite and ten blunt replies are all that two methods get here. COLD-Steer (arXiv 2603.06495) asks what one step
# of training on them would do to the activations, and adds that. SADI (arXiv 2410.12299) asks which few heads,
# neurons or coordinates tell them apart, and scales those. You will see on SmolLM2-135M what each changes inside, by
# layer and token, how far COLD-Steer's expansion holds, and what ten examples do not settle. Under two minutes on one
# core; no GPU.

# %%
import pandas as pd
import plotly.graph_objects as go
import torch
from clerk import EXCHANGES, UNSEEN, pairs_of
from plotly.subplots import make_subplots

import steerlens as sl
from steerlens.fit.objectives import labelled, objective
from steerlens.fit.reading import contrast_means
from steerlens.hosts import host_of
from steerlens.methods.sadi import top_k
from steerlens.models import smollm2

torch.set_num_threads(1)
model = smollm2()
host = host_of(model)

# %% [markdown]
# ## Ten pairs, and four that nothing is fitted on
#
# Both replies of a pair answer the same prompt, so that what differs is the tone.

# %%
print(*EXCHANGES[0], sep="\n")
pairs, held_out = pairs_of(EXCHANGES), pairs_of(UNSEEN)

# %% [markdown]
# ## A training step, in three approximations
#
# The loss is the paper's: dpo, small where the polite reply has a higher mean log probability than the blunt one.
#
# - `cold_fd`: u = -eta J g, the derivative J of the prompt's own activations along the parameters' gradient g. Exact
#   to first order, by forward-mode differentiation, or (`estimator="fd"`) by finite differences. It is fitted once,
#   and computed anew for each prompt, in a second pass.
# - `cold_kernel`: one vector, the mean gradient of the loss on the *activations*; what the parameters have to do with
#   them (J J' between the prompt and an example) is replaced by the identity.
# - `caa` knows nothing of training: the mean difference of the replies' last activations. It is here to compare with.
#
# By default eta is relative: the mean of |u| / |x| at the token before a reply's first, 0.1 here.

# %%
layers = [4, 9, 14]
kernel = sl.cold_kernel(model, pairs, layers=layers, eta=0.1, where="prompt")
exact = sl.cold_fd(model, pairs, layers=layers)
contrast = sl.caa(model, pairs, layers=layers)
for controller in (kernel, exact, contrast):
    print(controller)

# %% [markdown]
# Now every control is recorded at every token of all 28 texts. `stop_at_layer` saves the blocks after the last
# steered one, and `at(slice(0, None))` includes position 0.

# %%
texts = labelled(pairs, host, "both") + labelled(held_out, host, "both")
width = max(len(text.tokens) for text in texts)
ids = torch.tensor([text.tokens + [0] * (width - len(text.tokens)) for text in texts])
place = torch.arange(width)
in_prompt = torch.stack([(place >= 1) & (place < text.start) for text in texts])

methods = {"cold_kernel": kernel, "cold_fd": exact, "caa": contrast}
controls, states = {}, {}
with torch.no_grad():
    _, cache = model.run_with_cache(ids)
    for layer in layers:
        states[layer] = cache[f"blocks.{layer}.hook_resid_post"]
    for name, controller in methods.items():
        with sl.steer(model, controller.at(slice(0, None)), record="all") as run:
            model(ids, stop_at_layer=15)
        controls[name] = run.record.layers("u")

# %% [markdown]
# ### Do they point the same way?
#
# Cosines of the controls at the token before the reply, the mean over the texts. Then the same for vectors from
# halves of the examples; and how far finite differences are from forward mode, on a prompt and two pairs.

# %%
rows = []
for layer in layers:
    row = {"block": layer}
    for one, other in [("cold_kernel", "cold_fd"), ("cold_kernel", "caa"), ("cold_fd", "caa")]:
        first, second = (
            torch.stack([controls[name][layer][i, text.start - 1] for i, text in enumerate(texts)])
            for name in (one, other)
        )
        row[f"{one} · {other}"] = float(torch.cosine_similarity(first, second).mean())
    rows.append(row)
pd.DataFrame(rows).set_index("block").round(4)

# %%
for method in (sl.cold_kernel, sl.caa):
    first, second = (method(model, half, layers=14).loops[0].law.vector for half in (pairs[:5], pairs[5:]))
    cosine = float(torch.cosine_similarity(first, second, dim=0))
    print(f"{method.__name__}: cosine of the vectors from the first and the last five pairs {cosine:.2f}")

# %%
found = []
for estimator in ("jvp", "fd"):
    with sl.steer(model, sl.cold_fd(model, pairs[:2], layers=14, estimator=estimator), record="all") as run:
        model(UNSEEN[0][0])
    found.append(run.record.layers("u")[14])
print(
    f"forward mode and finite differences: {float((found[1] - found[0]).norm() / found[0].norm()):.1e} apart, relative"
)

# %% [markdown]
# The kernel keeps little of the step that it stands for: a cosine of 0.13 to 0.16. (In 576 dimensions two random
# directions have about 0.04, so that this is not nothing.) The contrast vector has nearly nothing to do with the
# exact step and, but for block 14, with the kernel. These are three methods, not three estimates of one direction.
# Nor do five pairs agree with five others, the kernel's less than the contrast vector's: ten examples give a
# direction, and cannot say how much of it is the tone they share. Finite differences agree with forward mode, with a
# step of 3e-6 of the parameters' norm; the absolute 1e-6 of the authors' code is below what float32 resolves.
#
# ### How large, and at which tokens?

# %%
figure = go.Figure()
shown = texts[0].start
tokens = [f"{i} {model.tokenizer.decode([token])!r}" for i, token in enumerate(texts[0].tokens[:shown])]
for name, colour in [("cold_kernel", "#1f77b4"), ("cold_fd", "#d62728"), ("caa", "#7f7f7f")]:
    norms = controls[name][14][0, :shown].norm(dim=-1)
    figure.add_scatter(x=tokens, y=norms, name=f"|u|, {name}", mode="lines+markers", line_color=colour)
figure.add_scatter(x=tokens, y=states[14][0, :shown].norm(dim=-1), name="|x|", line={"dash": "dot", "color": "black"})
figure.update_xaxes(title_text="token of the prompt (position and text)")
figure.update_yaxes(title_text="norm (activation units)", type="log")
figure.update_layout(title="Control and state after block 14", template="simple_white", width=900, height=420)

# %%
relative = {
    name: {layer: u[layer].norm(dim=-1) / states[layer].norm(dim=-1) for layer in layers}
    for name, u in controls.items()
}
pd.DataFrame(
    [
        {
            "method": name,
            "block": layer,
            "position 0": float(relative[name][layer][:, 0].mean()),
            "rest of the prompt": float(relative[name][layer][in_prompt].mean()),
            "before the first label": float(
                torch.stack([relative[name][layer][i, text.start - 1] for i, text in enumerate(texts)]).mean()
            ),
        }
        for name in ("cold_kernel", "cold_fd", "caa")
        for layer in layers
    ]
).set_index(["method", "block"]).round(4)

# %% [markdown]
# The vectors are the same at every token. The exact step is not: on position 0, whose state is more than a hundred
# times larger than the others', its control is about ten times larger, and along the prompt it varies threefold. That
# is why `where="prompt"` leaves position 0 alone; the authors' code does not.
#
# ## How far the expansion holds
#
# COLD-Steer stands for a step of gradient descent. Here that step is taken: a second copy of the model gets the
# parameters theta - (learning rate) g, and is compared with theta's activations plus u after block 14, for growing
# eta.

# %%
aim = objective("dpo", beta=0.1, reference=None)
direction, step = exact.loops[-1].tangent, float(exact.loops[-1].law.norm)  # step: the learning rate times |g|
copy, _ = smollm2(host="hf")
parameters = [copy.base_model.get_parameter(name) for name in direction.names]
rate = exact.recipe["found"]["rates"][-1]  # the learning rate that eta=0.1 became
etas = [0.05, 0.1, 0.3]
site = "blocks.14.hook_resid_post"


def mean_loss(logits):
    each = aim(logits, texts)  # one for each pair
    return {"ten examples": float(each[: len(pairs)].mean()), "held-out": float(each[len(pairs) :].mean())}


rows, remainders = [], []
with torch.no_grad():
    plain = mean_loss(model(ids))
    done = 0.0
    for eta in etas:
        for parameter, value in zip(parameters, direction.values, strict=True):
            parameter.sub_((eta - done) / 0.1 * step * value)
        done = eta
        out = copy(ids, output_hidden_states=True)
        rows.append({"eta": eta, "what": "gradient step on the parameters"} | mean_loss(out.logits))
        predicted = eta / 0.1 * controls["cold_fd"][14]
        gaps = ((out.hidden_states[15] - states[14] - predicted).norm(dim=-1) / predicted.norm(dim=-1))[in_prompt]
        row = {"eta": eta, "learning rate": eta / 0.1 * rate, "median": float(gaps.median())}
        remainders.append(row | {"nine tenths below": float(gaps.quantile(0.9)), "largest": float(gaps.max())})
    everything = torch.ones_like(in_prompt)
    for what, name, chosen in [
        ("cold_kernel, prompt", "cold_kernel", in_prompt),
        ("cold_fd, prompt", "cold_fd", in_prompt),
        ("cold_fd, every token of the text", "cold_fd", everything),
    ]:
        for eta in etas:
            push = eta / 0.1 * controls[name][14] * chosen[..., None]
            logits = model.run_with_hooks(ids, fwd_hooks=[(site, lambda x, hook, push=push: x + push)])
            rows.append({"eta": eta, "what": what} | mean_loss(logits))
losses = pd.DataFrame(rows)
print("what first order leaves out, |x(theta - step) - (x + u)| / |u|, over the tokens of the prompts:")
pd.DataFrame(remainders).set_index("eta").round(3)
# %% [markdown]
# From 0.1 to 0.05 the remainder nearly halves, as it must for a first derivative. But at the default, eta = 0.1, it
# is 38 % of u in the median, and single tokens are far off: a real step may make a token's state jump, and no
# derivative at theta knows of that. What `cold_fd` adds is exactly the derivative; it is the training step only well
# below 0.1.
#
# And the loss? Four curves: the step itself, the two methods on the prompts' tokens (where the paper has them), and
# `cold_fd` on the whole text, replies and position 0 included.

# %%
colours = dict(zip(losses["what"].unique(), ["black", "#1f77b4", "#d62728", "#ff9896"], strict=True))
figure = make_subplots(cols=2, shared_yaxes=True, subplot_titles=["the ten examples", "four held-out pairs"])
for column, which in enumerate(plain, start=1):
    for what, part in losses.groupby("what", sort=False):
        x, y = [0, *part["eta"]], [0, *(part[which] - plain[which])]
        line = {"color": colours[what]}
        figure.add_scatter(x=x, y=y, name=what, line=line, showlegend=column == 1, row=1, col=column)
slope = -(step**2) / rate / 0.1
change = losses.loc[0, "ten examples"] - plain["ten examples"]
print(f"at eta = {etas[0]}: first order {etas[0] * slope:+.4f} nats, the step {change:+.4f} nats")
line = {"dash": "dot", "color": "black"}
figure.add_scatter(
    x=[0, 0.2], y=[0, 0.2 * slope], name="its first order, -(learning rate) |g|²", line=line, mode="lines"
)
figure.update_xaxes(title_text="eta (mean |u| / |x|, no unit)")
figure.update_yaxes(title_text="change of the dpo loss (nats)", col=1)
figure.update_layout(title="What a step does to the loss", template="simple_white", width=1000, height=420)

# %% [markdown]
# For the step on the parameters the first-order prediction is good: the dotted line. The steered model is a different
# matter. At eta = 0.05 `cold_fd` brings a fifth of the step's gain on the prompts' tokens, and two thirds on all
# tokens. To first order the rest is what activations after block 14 cannot show: the embedding is also the
# unembedding here, and the step moves that too. At equal |u| / |x| the kernel lowers the loss faster than the exact
# derivative does, and on the four held-out pairs faster than the step itself, then flattens: it goes straight down
# the gradient on the activations, which is not what training would do. Four pairs are no measurement of how either
# generalises, and a low dpo loss says only that polite replies have become likelier *than blunt ones*, not that they
# are likely.
#
# ## SADI: which elements?
#
# SADI ranks every head, neuron or coordinate of the model by the mean difference of the two sides at the last token,
# and keeps the first k of all layers together. The table splits the ten pairs into halves and asks whether they
# choose the same.

# %%
points = {"head": "z", "neuron": "mlp_post", "hidden": "mlp_out"}
sites = [sl.Site(layer, point) for layer in range(host.n_layers) for point in points.values()]
halves = [contrast_means(host, half, sites) for half in (pairs[:5], pairs[5:])]
scores = []
for positive, negative in halves:
    scores.append({})
    for component, point in points.items():
        rows = [positive[s] - negative[s] for s in sites if s.point == point]
        scores[-1][component] = torch.stack([row.mean(-1) if component == "head" else row for row in rows])
counts = {"head": 4, "neuron": 50, "hidden": 10}
rows, by_layer = [], {}
for component, k in counts.items():
    whole = (scores[0][component] + scores[1][component]) / 2
    for normalize in (None, "layer_std"):
        mask = top_k(whole, k, normalize=normalize)
        first, second = (top_k(half[component], k, normalize=normalize) for half in scores)
        by_layer[component, normalize] = mask.sum(1)
        rows.append({"component": component, "normalize": str(normalize), "k": k, "of": mask.numel()})
        rows[-1]["in the last three blocks"] = int(mask[-3:].sum())
        rows[-1]["chosen by both halves"] = int((first & second).sum())
pd.DataFrame(rows).set_index(["component", "normalize"])

# %% [markdown]
# Five pairs against five pairs: for heads, the best component of the paper, none of four is chosen by both. The paper
# finds 150 pairs to be enough; ten are not, here. (The overlap is far above chance for neurons, and still a
# minority.) And the ranking goes by size, so that without `normalize` it picks the late blocks, where activations are
# large:

# %%
figure = make_subplots(cols=3, subplot_titles=[f"{counts[c]} of the {c} elements" for c in counts])
for column, component in enumerate(counts, start=1):
    for normalize, colour in ((None, "#1f77b4"), ("layer_std", "#ff7f0e")):
        figure.add_bar(
            x=list(range(host.n_layers)),
            y=by_layer[component, normalize],
            name=f"normalize={normalize!r}",
            marker_color=colour,
            showlegend=column == 1,
            row=1,
            col=column,
        )
figure.update_xaxes(title_text="block")
figure.update_yaxes(title_text="elements chosen (count)", col=1)
figure.update_layout(title="Where SADI acts", template="simple_white", width=1000, height=380)

# %% [markdown]
# ### How much is that?
#
# `share` is the norm of the chosen elements over the norm of all at that point. SADI multiplies it by the strength, 4
# by default. One prompt, its last token:

# %%
prompt = UNSEEN[1][0]
live = {component: sl.sadi(model, pairs, component=component, where="last_prompt") for component in counts}
rows = []
for component, controller in live.items():
    with sl.steer(model, controller) as run, torch.no_grad():
        model(prompt)
    for layer, share in run.record.layers("share").items():
        rows.append({"component": component, "block": layer, "share": float(share[0, -1])})
pd.DataFrame(rows).pivot(index="component", columns="block", values="share").round(2).fillna("")


# %% [markdown]
# The chosen neurons are most of what is active in blocks 24 and 28: the default strength, which makes them five times
# larger, makes the norm there three to four times larger. This is no small correction.
#
# ### Live and frozen
#
# The paper's equation scales the elements of the state at hand (`"live"`). The authors' code overwrites the points of
# *all* layers, at the last prompt token, by those of an unsteered pass with the chosen elements multiplied
# (`"frozen"`), so that a scaled element cannot reach the next one through the heads or neurons between. That needs
# the unsteered pass, a second one for each prompt. KL is the divergence of the next token's distribution (nats).


# %%
def last(controller):
    """The next token's log probabilities, and the state of the last prompt token after each block."""
    with sl.steer(model, controller, record=None), torch.no_grad():
        logits, cache = model.run_with_cache(prompt)
    state = torch.stack([cache[f"blocks.{layer}.hook_resid_post"][0, -1] for layer in range(host.n_layers)])
    return logits[0, -1].log_softmax(-1), state


def divergence(p, q):
    return float((p.exp() * (p - q)).sum())


plain_output, plain_state = last(live["head"] * 0)
rows, changes = [], {}
for component, strength in [("head", 4.0), ("neuron", 1.0), ("neuron", 4.0)]:
    kinds = {
        "live": live[component] * (strength / 4),
        "frozen": sl.sadi(model, pairs, component=component, strength=strength, mode="frozen", paper=True),
    }
    found = {name: last(controller) for name, controller in kinds.items()}
    row = {"component": component, "strength": strength}
    for name, (output, state) in found.items():
        row[f"loops, {name}"] = len(kinds[name].loops)
        row[f"KL({name}, unsteered)"] = divergence(output, plain_output)
        changes[component, strength, name] = (state - plain_state).norm(dim=-1) / plain_state.norm(dim=-1)
    row["KL(live, frozen)"] = divergence(found["live"][0], found["frozen"][0])
    rows.append(row)
pd.DataFrame(rows).set_index(["component", "strength"]).round(3)

# %%
figure = go.Figure()
for (component, _, name), change in changes.items():
    if component == "head":
        figure.add_scatter(x=list(range(host.n_layers)), y=change, name=name, mode="lines+markers")
figure.update_xaxes(title_text="block")
figure.update_yaxes(title_text="|x - x0| / |x0|, last prompt token (no unit)")
figure.update_layout(title="Four heads scaled, live and frozen", template="simple_white", width=900, height=400)

# %% [markdown]
# For four heads it hardly matters which: the changes are late, and little comes after. For fifty neurons at strength
# 4 the two are different interventions, and the live one breaks the model: ten nats. A strength from a paper is worth
# nothing without such a look.
#
# (Live, `controller * 0.25` is the same as a quarter of the strength. Frozen it is not: the law sets a state, and a
# quarter of its control goes a quarter of the way there.)
#
# ## What this notebook does not show
#
# That either method steers well. COLD-Steer's paper reports large gains of `cold_fd` in choosing between the two
# letters of behavioural questions, with 50 pairs and models of 7 billion parameters (and hardly any of
# `cold_kernel`); SADI's reports accuracies of multiple choice. A model of 135 million parameters answers such
# questions at chance, and steering moves its answers without a consistent sign, so neither claim can be tested here.
# Whether replies became more polite was not measured: that takes held-out prompts by the dozen, several seeds, a
# scorer, and a random direction at equal divergence beside it. What carries over is what was computed: that the
# kernel and the exact step are different directions, how far a first-order step reaches, what the ranking of SADI
# prefers, and that frozen and live part with strength. The numbers are those of ten pairs and one model.
