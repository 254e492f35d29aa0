# %% [markdown]
# # 8. When to steer: tokens, gates, schedules
#
# **You will see** which tokens each value of `where` steers, one row of a batch steered while the other is left alone,
# and a control that fades while tokens are generated, on SmolLM2-135M. **Time:** under a minute on two cores; no GPU.

# %%
import plotly.graph_objects as go
import torch

import steerlens as sl
from steerlens.models import smollm2

model = smollm2()
pairs = sl.shipped("ocean", split="dev", read="mean")
ocean = sl.caa(model, pairs, layers=15) * 1.5
options = {"do_sample": False, "verbose": False}

# %% [markdown]
# ## Which tokens
#
# The same controller at other tokens is `controller.at(...)`. Position 0 is left alone by every name, since many models
# keep an activation a hundred times larger there. Positions are followed over a whole generation, so they mean the same
# with and without a KV cache.

# %%
prompt = "The letter that came this morning"
places = {
    "last": "last",
    "generated": "generated",
    "prompt": "prompt",
    "all": "all",
    "slice(2, 5)": slice(2, 5),
}
rows, texts = [], []
for where in places.values():
    with sl.steer(model, ocean.at(where)) as run:
        texts.append(model.generate(prompt, max_new_tokens=8, **options))
    steered = run.record.layers("u_norm")[15][0].nan_to_num() > 0
    rows.append(steered.float().tolist())
written = [f"generated {number}" for number in range(1, 8)]
tokens = model.to_str_tokens(prompt) + written
tokens = [f"{index} {token}" for index, token in enumerate(tokens)]
figure = go.Figure(
    go.Heatmap(
        z=rows,
        x=tokens,
        y=list(places),
        xgap=2,
        ygap=2,
        colorscale="Blues",
        showscale=False,
    )
)
figure.update_xaxes(title_text="token")
figure.update_yaxes(title_text="where", autorange="reversed", automargin=True)
figure.update_layout(
    template="simple_white",
    width=900,
    height=420,
    title="Steered tokens are dark",
)

# %%
for where, text in zip(places, texts, strict=True):
    print(f"{where:12} {text}")

# %% [markdown]
# `"last"`, the default, is the last token of the prompt and every token after it. The last token that is generated is
# never read, so it is not in the picture.
#
# ## Which prompts: a gate
#
# `gate` fits a condition on prompts, here complaints against questions, and `when` makes any controller wait for it:
#
# $$\text{open} \iff \langle x, s\rangle > b, \qquad s = \frac{\bar x_+ - \bar x_-}{|\bar x_+ - \bar x_-|}$$
#
# with $x$ the mean activation over the prompt, unsteered, and $b$ half way between the two means. `gate_layers` keeps it
# before the layer that is steered; otherwise it would cost a second pass over each prompt.

# %%
complaints = [
    "My parcel is late again.",
    "This bill is wrong.",
    "These shoes are too small.",
    "My room is far too cold.",
    "The lift is broken.",
    "My tea has gone cold.",
]
questions = [
    "Where is the milk?",
    "Can you wrap this book?",
    "Is this seat taken?",
    "When do you close today?",
    "Which train goes south?",
    "Do you have a free table?",
]
texts = sl.Pairs(complaints, questions)
complains = sl.gate(model, texts, gate_layers=range(14))
gated = sl.when(ocean, complains)
for text in (
    "This clock has stopped.",
    "Is there milk in the soup?",
    "My umbrella is gone.",
    "May I try on this jacket?",
):
    with sl.steer(model, gated) as run, torch.no_grad():
        model(text)
    score = float(run.record.stack("score")[0, 0, -1])
    opened = float(run.record.stack("gate")[0, 0, -1])
    print(f"{text:30} score {score:+6.2f}, gate {opened:.0f}")

# %% [markdown]
# These four were not fitted on. Whether the gate has learnt about complaints or about question marks they cannot say: the
# two go together in all of them.
#
# ## Over a generation: a schedule
#
# `schedule` multiplies the control by a factor for each generated token. Here a complaint and a question in one batch,
# through the gate, and a control that fades.

# %%
batch = ["The clock in my room has stopped.", "Is there any milk in the soup?"]
fading = sl.schedule(gated, [1, 1, 1, 0.75, 0.5, 0.25, 0])
figure, colours = go.Figure(), ["#d62728", "#1f77b4"]
plain = model.generate(batch, max_new_tokens=12, **options)
for name, controller, dash in (
    ("gated", gated, "solid"),
    ("gated and fading", fading, "dot"),
):
    with sl.steer(model, controller) as run:
        answers = model.generate(batch, max_new_tokens=12, **options)
    print(
        f"{name}: the closed row is the unsteered one:",
        f"{answers[1] == plain[1]}; the other: {answers[0]!r}",
    )
    norms = run.record.layers("u_norm")[15][:, -12:]
    for row, values in enumerate(norms.tolist()):
        figure.add_scatter(
            y=values,
            name=f"{name}: {batch[row]}",
            line={"dash": dash, "color": colours[row]},
        )
figure.update_xaxes(title_text="token (0: the last of the prompt)")
figure.update_yaxes(title_text="|u| (activation units)")
figure.update_layout(
    template="simple_white",
    width=900,
    height=420,
    title="A gate and a schedule, two rows of a batch",
)
figure.update_layout(legend={"orientation": "h", "y": -0.3})

# %% [markdown]
# The decision was made at the prompt and holds for the generation. Each row of a batch has its own.
#
# ## What was not shown
#
# How good a gate is: six prompts a side and four to look at are no test; measure false openings on prompts of your own
# kind. More about positions, chats, scoring and decoding loops of your own is in
# [Which tokens are steered](../docs/which_tokens.md).
