# %% [markdown]
# # When to steer: gates and schedules
#
# The ten exchanges of tutorial 03, on SmolLM2-135M: one row of a batch is steered, the other left alone, and the
# control fades while tokens are generated. Under a minute on one core; no GPU.
#
# Should every guest be treated alike? `gate` fits a condition on prompts, here six complaints against six questions,
# and `when` makes any controller wait for it. Each row of a batch has a decision of its own, made on its unsteered
# prompt. The controller is `cold_kernel`, at twice the default eta and, other than in the paper, on the generated
# tokens too, so that there is something to see while decoding.

# %%
import plotly.graph_objects as go
import torch
from clerk import EXCHANGES, UNSEEN, pairs_of

import steerlens as sl
from steerlens.models import smollm2

torch.set_num_threads(1)
model = smollm2()

# %%
prompts = [prompt for prompt, _, _ in EXCHANGES] + [
    "Guest: The lift is broken again.\nClerk:",
    "Guest: My tea has gone cold.\nClerk:",
]
complaints = [prompt for prompt in prompts if "?" not in prompt]
questions = [prompt for prompt in prompts if "?" in prompt]
complains = sl.gate(model, sl.Pairs(complaints, questions), gate_layers=range(14))
print(f"{len(complaints)} complaints, {len(questions)} questions; decides at {complains.summaries[0].site}")

steady = sl.cold_kernel(model, pairs_of(EXCHANGES), layers=14, eta=0.2, where="last")
gated = sl.when(steady, complains)
with sl.steer(model, gated) as run, torch.no_grad():
    for prompt, _, _ in UNSEEN:
        model(prompt)
        gate, score = (float(run.record.stack(signal)[0, 0, -1]) for signal in ("gate", "score"))
        print(f"{prompt.splitlines()[0]:36} score {score:+5.1f}, gate {gate:.0f}")

# %% [markdown]
# All four held-out prompts are told apart. Whether the gate has learnt about complaints or about question marks,
# these prompts cannot say: the two go together in all of them.
#
# Now a complaint and a question in one batch. `schedule` multiplies the control by a factor for each generated token.

# %%
batch = [UNSEEN[1][0], UNSEEN[2][0]]
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

# %% [markdown]
# The decision was made at the prompt and holds for the generation; the closed row has no control at all, and its text
# is the unsteered one. The fading control is gone after five tokens. Note that the steered clerk is not a more polite
# clerk in any sense that two greedy lines could show.
