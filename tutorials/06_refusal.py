# %% [markdown]
# # 6. Refusal in chat: a number, side effects, and care
#
# **You will see** a vector that makes SmolLM2-135M-Instruct decline requests, how many of twelve it declines at which
# strength beside random directions, what else changes, and the same vector behind a gate that opens for one topic only.
# **Time:** under three minutes on two cores; no GPU.

# %%
import pandas as pd

import steerlens as sl
from steerlens.evaluate import generate_texts, kl, neutral_loss, refusal
from steerlens.models import smollm2

model = smollm2()

# %% [markdown]
# ## Chat messages, and where the answer begins
#
# Texts may be lists of messages; they go through the model's own chat template. A prompt to be answered ends with the
# *generation prompt*, the tokens after which the assistant begins. A vector that is read or added one token too early
# acts on the end of the user's turn instead.


# %%
def asked(question, answer=None):
    messages = [{"role": "user", "content": question}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer.strip()})
    return messages


print(
    model.tokenizer.apply_chat_template(
        asked("How do I keep basil alive?"),
        tokenize=False,
        add_generation_prompt=True,
    )
)

# %% [markdown]
# ## A direction of refusal
#
# Harmless requests, each with an answer that declines and one that complies, read as the mean over the answer's tokens.
# No harmful text is needed. The control is the same at every layer and token, in small doses:
#
# $$x_t \leftarrow x_t + s\,(\bar x_{t,\text{declines}} - \bar x_{t,\text{complies}})$$

# %%
data = sl.shipped("compliance", split="dev")
pairs = sl.Pairs(
    [asked(*text) for text in data.negative],
    [asked(*text) for text in data.positive],
    read="completion",
)
print("declines:", data.negative[0], "\ncomplies:", data.positive[0])
decline = sl.caa(model, pairs, layers=range(30), where="all", strength=0.1)

# %% [markdown]
# ## How many of twelve, and at what price
#
# `refusal` counts answers that begin as a refusal does, by a list of phrases: a proxy, so some answers are printed below.
# Beside it stand the KL from the unsteered model and the loss on neutral sentences, for this vector and for random
# directions of the same size.

# %%
requests = [asked(text) for text in sl.shipped_texts("instructions")[1::2]]
found = sl.evaluate(
    model,
    decline,
    refusal(requests),
    prompts=requests,
    damage=[kl(tokens=8), neutral_loss()],
    baselines=("unsteered", "random"),
    strengths=(0.5, 0.75, 1.0),
    seeds=1,
    max_new_tokens=12,
    temperature=0,
    progress=False,
)
columns = ["strength", "effect", "low", "high", "KL mean", "neutral loss"]
table = found.table()[columns]
table.rename(columns={"effect": "refusals (share)"}).round(2)

# %%
found.plot()

# %%
for strength in (0.0, 1.0):
    print(f"strength {strength}")
    steered = decline * strength
    answers = generate_texts(model, steered, requests[:3], max_new_tokens=16)
    for request, answer in zip(requests[:3], answers, strict=True):
        text = " ".join(answer.text.split())
        print("   ", request[0]["content"], "->", text)

# %% [markdown]
# Refusal is bought with KL, more of it than a concept needs (random directions of the same norm move the output far less),
# and it is no clean switch: answers become vague, or claim that the model lacks abilities which it has. At the largest
# strength the count falls, because "I'm not sure what you're asking" is in no list of phrases. Read before you count.
#
# ## Only where it is wanted
#
# A vector that is always on declines everything, which is a side effect, not a policy. Suppose that an assistant should
# not give medical advice. `gate` learns the topic from six medical questions against twelve other requests, at the last
# token of the prompt, and `when` steers only the rows of a batch for which it opens.

# %%
medical = [
    "How much ibuprofen may I take for my back?",
    "Is this red rash on my arm dangerous?",
    "Can I stop my antibiotics early?",
    "What helps against a migraine?",
    "Do I need a vaccine before the trip?",
    "Why does my chest hurt at night?",
]
topic = sl.Pairs(
    [asked(text) for text in medical],
    [asked(text) for text in sl.shipped_texts("instructions")[::2]],
)
guarded = sl.when(decline, sl.gate(model, topic, pool="last"))

new = [
    "What dose of aspirin is safe?",
    "Should this wound be stitched?",
    "Are these sleeping pills addictive?",
]
prompts = [*[asked(text) for text in new], *requests[1:7]]
options = {
    "damage": [],
    "baselines": (),
    "strengths": [0.75],
    "max_new_tokens": 12,
    "temperature": 0,
}
rows = {}
for name, controller in {
    "always on": decline,
    "behind the gate": guarded,
}.items():
    measured = sl.evaluate(
        model,
        controller,
        refusal(prompts),
        prompts=prompts,
        progress=False,
        **options,
    )
    declined = measured.change(*measured.arms[-1])
    rows[name] = {
        "medical": f"{declined[:3].sum():.0f} of 3",
        "other": f"{declined[3:].sum():.0f} of 6",
    }
pd.DataFrame(rows).T

# %% [markdown]
# Behind a closed gate nothing is added, so these rows are the unsteered ones bit for bit. What remains to be tested is
# the gate: questions that it misses, and others that it takes for medical.
#
# ## Care
#
# - **It cuts both ways.** Where a model has been trained to refuse, the same direction with the opposite sign, or
#   projected out, removes refusals (arXiv 2406.11717). Whoever has the weights can do that; a vector is not a safeguard,
#   and a file of one that disables refusals should be treated as such.
# - **Report the misses.** A rate of refusals says nothing about what got through, or what was declined without need.
# - **Say what it costs** on ordinary requests, and to whom.
#
# ## What was not shown
#
# Safety. All requests here are harmless and the model is small; a list of phrases cannot judge an answer. Jailbreaks,
# long conversations and other languages were not tried. For a judged benchmark see `sl.evaluate.inspect_ai`.
