# %% [markdown]
# # Few examples: COLD-Steer and SADI from ten pairs, and when to steer at all

# %%
import pandas as pd
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

import steerlens as sl
from steerlens.fitting import contrast_means
from steerlens.hosts import host_of
from steerlens.methods.sadi import top_k
from steerlens.models import smollm2
from steerlens.objectives import labelled, objective

torch.set_num_threads(1)
model = smollm2()
host = host_of(model)

# %% [markdown]
# ## Ten pairs

# %%
exchanges = [
    ("Guest: Where is the milk?\nClerk:", " In aisle four. Shall I show you?", " Somewhere. Look for it yourself."),
    ("Guest: My parcel is late.\nClerk:", " I am sorry. Let me look into it.", " Not my problem. Things get lost."),
    ("Guest: Can you wrap this book?\nClerk:", " With pleasure. Which paper?", " No. We only sell them."),
    ("Guest: Is this seat taken?\nClerk:", " Please, do sit down.", " Can you not see that?"),
    ("Guest: I think this bill is wrong.\nClerk:", " Thank you, I will check it.", " Just pay it and leave."),
    ("Guest: Do you have a free table?\nClerk:", " Of course, by the window?", " We are full. Come another day."),
    ("Guest: When do you close today?\nClerk:", " At nine, and you are welcome.", " At nine. Read the sign."),
    ("Guest: These shoes are too small.\nClerk:", " Let me find a better pair.", " You should have tried them on."),
    ("Guest: My room is rather cold.\nClerk:", " I do apologise. A warm blanket?", " Then put on your coat."),
    ("Guest: Which train goes south?\nClerk:", " The next one. Have a lovely trip.", " That is what the board is for."),
]
unseen = [
    ("Guest: May I try on this jacket?\nClerk:", " Of course. The mirror is here.", " If you must. Be quick."),
    ("Guest: My umbrella is gone.\nClerk:", " I am so sorry. Let us look.", " Look after your things."),
    ("Guest: Is there milk in the soup?\nClerk:", " One moment, I will gladly ask.", " How should I know?"),
    ("Guest: This clock has stopped.\nClerk:", " Thank you for telling me.", " So what? Leave it alone."),
]


def pairs_of(rows):
    return sl.Pairs([(prompt, polite) for prompt, polite, _ in rows], [(prompt, blunt) for prompt, _, blunt in rows])


pairs, held_out = pairs_of(exchanges), pairs_of(unseen)

# %%
layers = [4, 9, 14]
kernel = sl.cold_kernel(model, pairs, layers=layers)
exact = sl.cold_fd(model, pairs, layers=layers)
difference = sl.cold_fd(model, pairs, layers=layers, estimator="fd")
contrast = sl.caa(model, pairs, layers=layers)
for controller in (kernel, exact, difference, contrast):
    print(controller)

# %%
texts = labelled(pairs, host, "both") + labelled(held_out, host, "both")
width = max(len(text.tokens) for text in texts)
ids = torch.tensor([text.tokens + [0] * (width - len(text.tokens)) for text in texts])
place = torch.arange(width)
in_prompt = torch.stack([(place >= 1) & (place < text.start) for text in texts])
fitted = torch.arange(len(texts)) < 2 * len(pairs)

methods = {"cold_kernel": kernel, "cold_fd": exact, "cold_fd, differences": difference, "caa": contrast}
controls, states = {}, {}
with torch.no_grad():
    _, cache = model.run_with_cache(ids)
    for layer in layers:
        states[layer] = cache[f"blocks.{layer}.hook_resid_post"]
    for name, controller in methods.items():
        with sl.steer(model, controller.at(slice(0, None)), record="all") as run:
            model(ids, stop_at_layer=15)
        controls[name] = run.record.layers("u")

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
    apart = (controls["cold_fd"][layer] - controls["cold_fd, differences"][layer])[in_prompt].norm()
    row["error of differences"] = float(apart / controls["cold_fd"][layer][in_prompt].norm())
    rows.append(row)
pd.DataFrame(rows).set_index("block").round(4)

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
# ## how far the expansion holds

# %%
aim = objective("dpo", beta=0.1, reference=None)
direction, norm = exact.loops[-1].tangent, float(exact.loops[-1].law.norm)
copy, _ = smollm2(host="hf")
parameters = [copy.base_model.get_parameter(name) for name in direction.names]
rate = exact.loops[-1].strength  # the learning rate that eta=0.1 became
etas = [0.05, 0.1, 0.2, 0.4]
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
            parameter.sub_((eta - done) / 0.1 * rate * norm * value)
        done = eta
        out = copy(ids, output_hidden_states=True)
        rows.append({"eta": eta, "what": "gradient step on the parameters"} | mean_loss(out.logits))
        predicted = eta / 0.1 * controls["cold_fd"][14]
        gaps = ((out.hidden_states[15] - states[14] - predicted).norm(dim=-1) / predicted.norm(dim=-1))[in_prompt]
        row = {"eta": eta, "learning rate": eta / 0.1 * rate, "median": float(gaps.median())}
        remainders.append(row | {"largest tenth begins at": float(gaps.quantile(0.9)), "largest": float(gaps.max())})
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
print(losses)
pd.DataFrame(remainders).set_index("eta").round(5)
# %%
colours = dict(zip(losses["what"].unique(), ["black", "#1f77b4", "#d62728", "#ff9896"], strict=True))
figure = make_subplots(cols=2, shared_yaxes=True, subplot_titles=["the ten examples", "four held-out pairs"])
for column, which in enumerate(plain, start=1):
    for what, part in losses.groupby("what", sort=False):
        x, y = [0, *part["eta"]], [0, *(part[which] - plain[which])]
        line = {"color": colours[what]}
        figure.add_scatter(x=x, y=y, name=what, line=line, showlegend=column == 1, row=1, col=column)
slope = -rate * norm**2 / 0.1
line = {"dash": "dot", "color": "black"}
figure.add_scatter(
    x=[0, 0.2], y=[0, 0.2 * slope], name="its first order, -(learning rate) |g|²", line=line, mode="lines"
)
figure.update_xaxes(title_text="eta (mean |u| / |x|, no unit)")
figure.update_yaxes(title_text="change of the dpo loss (nats)", col=1)
figure.update_layout(title="What a step does to the loss", template="simple_white", width=1000, height=420)

# %% [markdown]
# ## SADI

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

# %%
prompt = unseen[1][0]
live = {component: sl.sadi(model, pairs, component=component) for component in counts}
rows = []
for component, controller in live.items():
    with sl.steer(model, controller) as run, torch.no_grad():
        model(prompt)
    for layer, share in run.record.layers("share").items():
        rows.append({"component": component, "block": layer, "share": float(share[0, -1])})
pd.DataFrame(rows).pivot(index="component", columns="block", values="share").round(2).fillna("")


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
        "frozen": sl.sadi(model, pairs, component=component, strength=strength, mode="frozen"),
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
for (component, strength, name), change in changes.items():
    if component == "head":
        figure.add_scatter(x=list(range(host.n_layers)), y=change, name=name, mode="lines+markers")
figure.update_xaxes(title_text="block")
figure.update_yaxes(title_text="|x - x0| / |x0|, last prompt token (no unit)")
figure.update_layout(title="Four heads scaled, live and frozen", template="simple_white", width=900, height=400)

# %% [markdown]
# ## gates

# %%
prompts = [prompt for prompt, _, _ in exchanges] + [
    "Guest: The lift is broken again.\nClerk:",
    "Guest: My tea has gone cold.\nClerk:",
]
complaints = [prompt for prompt in prompts if "?" not in prompt]
questions = [prompt for prompt in prompts if "?" in prompt]
complains = sl.gate(model, sl.Pairs(complaints, questions), layers=range(14))
print(f"{len(complaints)} complaints, {len(questions)} questions; decides at {complains.summaries[0].site}")

steady = sl.cold_kernel(model, pairs, layers=14, eta=0.2, where="last")
gated = sl.when(steady, complains)
with sl.steer(model, gated) as run, torch.no_grad():
    for prompt, _, _ in unseen:
        model(prompt)
        gate, score = (float(run.record.stack(signal)[0, 0, -1]) for signal in ("gate", "score"))
        print(f"{prompt.splitlines()[0]:36} score {score:+5.1f}, gate {gate:.0f}")

# %%
batch = [unseen[1][0], unseen[2][0]]
fading = sl.schedule(gated, [1, 1, 1, 0.5, 0.25, 0])
answers, norms = {"unsteered": model.generate(batch, max_new_tokens=10, do_sample=False, verbose=False)}, {}
for name, controller in {"steered": steady, "gated": gated, "gated, fading": fading}.items():
    with sl.steer(model, controller) as run:
        answers[name] = model.generate(batch, max_new_tokens=10, do_sample=False, verbose=False)
    norms[name] = run.record.stack("u_norm")[0]
for row, prompt in enumerate(batch):
    print(prompt.splitlines()[0])
    for name, texts_out in answers.items():
        print(f"    {name:14}", texts_out[row].removeprefix(prompt).replace("\n", " "))
print("the closed row equals the unsteered one:", answers["gated"][1] == answers["unsteered"][1])

# %%
figure = go.Figure()
for name, dash in {"gated": "solid", "gated, fading": "dot"}.items():
    for row, colour in enumerate(["#d62728", "#1f77b4"]):
        last_prompt = norms[name].shape[1] - 10
        x = [i - last_prompt for i in range(norms[name].shape[1])]
        label = f"{name}: {batch[row].splitlines()[0]}"
        figure.add_scatter(
            x=x, y=norms[name][row], name=label, mode="lines+markers", line={"dash": dash, "color": colour}
        )
figure.update_xaxes(title_text="token (0 is the last of the prompt)")
figure.update_yaxes(title_text="|u| (activation units)")
figure.update_layout(title="A gate and a schedule, two rows of a batch", template="simple_white", width=900, height=400)
