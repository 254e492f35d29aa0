# %% [markdown]
# # Quickstart: hold a concept at a level, in closed loop
#
# You will fit a controller for SmolLM2-135M from sixteen sentences about the sea, steer with it, and look at what it
# did at each layer and token. About a minute on two cores; no GPU, no network beyond PyPI.
#
# The method is A-LQR (arXiv 2604.19018): before each block it measures how far the residual stream is from where a
# text about the sea would have it, and after the block it adds a correction. How large a correction is worth its cost
# at which layer is answered once, when the controller is fitted, by a linear quadratic regulator over the layers.

# %%
import torch

import steerlens as sl
from steerlens.models import smollm2

torch.set_num_threads(2)
model = smollm2()  # a TransformerBridge; host="nnsight" or host="hooked" give the other kinds

# %% [markdown]
# ## Contrast data
#
# `Pairs` holds texts that show what you want and texts that do not. By default the last token of each text is read.

# %%
pairs = sl.shipped("ocean")
for text in pairs.positive[:3]:
    print("+", text)
for text in pairs.negative[:3]:
    print("-", text)

# %% [markdown]
# ## Fit
#
# `linearize` computes the Jacobian of every block for the last token of four of the texts. The regulator itself takes
# seconds, so the linearization is kept and used for two levels. `level` is the setpoint in units of the distance
# between the two classes.

# %%
plant = sl.linearize(model, pairs.positive[:4], progress=False)
gentle = sl.lqr(model, pairs, level=1.0, linearization=plant)
strong = sl.lqr(model, pairs, level=2.0, linearization=plant)
strong

# %% [markdown]
# There is no loop at layer 0: all sentences end in a full stop, so before the first block they are all the same.
#
# ## Steer
#
# Every call of the model inside the `with` block is steered, `generate` included.

# %%
prompt = "My weekend was"


def continuation() -> str:
    return model.generate(prompt, max_new_tokens=24, do_sample=False, verbose=False)


print("unsteered: ", continuation())
with sl.steer(model, gentle):
    print("level 1:", continuation())
with sl.steer(model, strong) as run:
    print("level 2:", continuation())
print("afterwards:", continuation())

# %% [markdown]
# The last line equals the first: nothing is left behind.
#
# ## What the loop did
#
# The run has recorded one number per layer and token: the distance to the setpoint and the size of the control. Blank
# columns are prompt tokens, which this controller leaves alone: `where="last"` steers the last prompt token and every
# token after it.

# %%
run.plot()

# %% [markdown]
# The error does not go to zero: control has a price (`r`), and the feature is pulled towards its setpoint, not nailed
# to it. Late layers have larger errors and larger controls because the residual stream itself grows with depth.
#
# ## The controller's state in the activation cache
#
# While a run lasts, its signals are hook points like any other: `run_with_cache` caches them, `names_filter` selects
# them, and a hook may change them. Here the control of layer 20 is set to zero while all other layers go on.

# %%
with sl.steer(model, strong):
    logits, cache = model.run_with_cache(prompt)
    without = model.run_with_hooks(prompt, fwd_hooks=[("blocks.20.hook_steer_u", lambda u, hook: 0 * u)])

print("error at layer 20, by token:", [round(float(x), 1) for x in cache["steer_error", 20][0]])
print("norm of u at layer 20:      ", [round(float(x), 1) for x in cache["steer_u", 20][0].norm(dim=-1)])
print("largest change of a logit without it:", round(float((logits - without).abs().max().detach()), 2))

# %% [markdown]
# Tokens that were not steered show `nan`: the loop did not look there.
#
# ## Keep it
#
# A controller is data: directions, levels, gains, and a recipe that says how it was made. It saves to one file, steers
# the same model in nnsight too, and refuses a model other than the one it was fitted on.

# %%
strong.save("ocean.safetensors")
loaded = sl.Controller.load("ocean.safetensors")
print(loaded)
print(
    {name: loaded.recipe["arguments"][name] for name in ("level", "q", "r", "qf", "origin")},
    loaded.recipe["found"]["linearized_on"],
)

# %% [markdown]
# ## What this notebook does not show
#
# That steering is *good*: one prompt and greedy decoding prove nothing about quality. Text about the sea is easy to
# recognise in a model of this size, but at level 3 it begins to fall apart.

# %%
import os

os.remove("ocean.safetensors")
