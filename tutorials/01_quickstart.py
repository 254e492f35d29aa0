# %% [markdown]
# # 1. Quickstart: make a model write about the ocean
#
# **You will see** SmolLM2-135M continue twenty sentences, unsteered and steered towards the ocean by two methods, with a
# count of how many continuations mention it; then what the controller did at each layer and token. **Time:** about a
# minute and a half on two cores; no GPU.

# %%
import re

import pandas as pd

import steerlens as sl
from steerlens.evaluate import generate_texts, kl
from steerlens.models import smollm2

# a TransformerBridge; your own model, or one of nnsight, takes its place
model = smollm2()

# %% [markdown]
# ## Texts that show what you want, and texts that do not
#
# The two sides are read as the mean activation over the tokens of each text. Often a text's last token is a full stop,
# and a direction fitted there is that of the full stop.

# %%
pairs = sl.shipped("ocean", split="dev", read="mean")
print(
    *[f"+ {text}" for text in pairs.positive[:3]],
    *[f"- {text}" for text in pairs.negative[:3]],
    sep="\n",
)

# %% [markdown]
# ## Two methods
#
# **CAA** adds one vector at one layer, the difference of the two means:
#
# $$x \leftarrow x + s\,(\bar x_+ - \bar x_-)$$
#
# **A-LQR** is a feedback loop: before each block it measures how far the state $x_t$ is from a setpoint along the
# direction $v_t$ of that layer, and after the block it adds a control in proportion, with a gain $K_t$ from a linear
# quadratic regulator over all layers. The setpoint is a shift by `level` = 2 class differences $\mu_t$, counted from the
# state $x^0_t$ that the same token has without steering (a second pass beside the steered one knows it):
#
# $$u_t = K_t\,e_t, \qquad e_t = (2\,\mu_t + \langle v_t, x^0_t\rangle - \langle v_t, x_t\rangle)\,v_t$$
#
# These are defaults that were chosen by measurement, see [The closed loop](../docs/closed_loop.md); `paper=True` takes the
# settings of the paper.

# %%
controllers = {
    "CAA": sl.caa(model, pairs),
    "A-LQR": sl.lqr(model, pairs, progress=False),
}

# %% [markdown]
# ## The same price for both
#
# How strong should each be? `calibrate` finds the strength at which a controller moves the distribution of the next
# token by a given KL divergence from the unsteered model, on prompts that are not used below.

# %%
others, prompts = (
    sl.shipped_texts("prompts", split="dev")[:8],
    sl.shipped_texts("prompts", split="held_out")[:20],
)
for name, controller in controllers.items():
    fit = sl.calibrate(
        model,
        controller,
        others,
        budget=kl(tokens=16) <= 0.5,
        progress=False,
    )
    controllers[name] = fit.controller
    print(name, fit, sep=": ")

# %% [markdown]
# ## Steer, read, count
#
# A continuation counts if one of these words is in it: crude, but anybody can check it. Decoding is greedy.

# %%
words = re.compile(
    r"\bsea|ocean|wave|ship|sail|boat|coast|beach|shore"
    r"|fish|coral|tide|island|whale|water|marine|harbo",
    re.IGNORECASE,
)
texts = {"unsteered": generate_texts(model, None, prompts, max_new_tokens=20)}
for name, controller in controllers.items():
    texts[name] = generate_texts(model, controller, prompts, max_new_tokens=20)
for prompt, *written in list(zip(prompts, *texts.values(), strict=True))[:4]:
    print(prompt, "...")
    for name, text in zip(texts, written, strict=True):
        print(f"    {name:10}", " ".join(text.text.split()))
counts = {
    # of the continuations alone
    name: sum(bool(words.search(text.text)) for text in own)
    for name, own in texts.items()
}
pd.Series(counts, name=f"about the ocean, of {len(prompts)}").to_frame()

# %% [markdown]
# ## In your own code
#
# `generate_texts` saved some lines above. In general, every call of the model inside `with sl.steer(...)` is steered,
# and nothing is left behind afterwards.

# %%
prompt = "My weekend was"
options = {"max_new_tokens": 20, "do_sample": False, "verbose": False}
plain = model.generate(prompt, **options)
with sl.steer(model, controllers["A-LQR"]) as run:
    steered = model.generate(prompt, **options)
print(steered)
print("unsteered again:", model.generate(prompt, **options) == plain)

# %% [markdown]
# ## What the loop did
#
# One number for each layer and token: the distance to the setpoint, and the size of the control. Blank columns are
# tokens of the prompt, which are left alone: `where="last"`, the default, steers the last prompt token and each token
# after it.

# %%
run.record.plot(tokens=model.to_str_tokens(steered))

# %% [markdown]
# The error does not go to zero: control has a price, and the state is pulled towards its setpoint, not nailed to it.
#
# ## Keep it
#
# A controller is data: it saves to one file, steers the same model in nnsight too, and refuses a model other than the
# one that it was fitted on.

# %%
controllers["A-LQR"].save("ocean.safetensors")
sl.Controller.load("ocean.safetensors")

# %% [markdown]
# ## What was not shown
#
# That one method is better than the other: twenty prompts, one concept and a list of words cannot rank 11 and 16. Nor
# that the text is still good: [tutorial 3](03_layer_and_strength.ipynb) measures what steering damages, and
# [tutorial 4](04_closed_loop.ipynb) when feedback pays.
