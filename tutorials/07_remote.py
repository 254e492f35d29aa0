# %% [markdown]
# # The same controller on a server
#
# You will fit A-LQR on local weights, send it to an NDIF server that holds the model, and compare: the same tokens, the
# same record, from a client without weights. Half a minute once the server is up.
#
# Nothing in this notebook is special to the small server that built it. On a real cluster set `NDIF_HOST` and
# `NDIF_API_KEY` as nnsight's documentation says, and name the model by its repository.

# %%
import os

import nnsight
import torch
from transformers import AutoTokenizer

import steerlens as sl

nnsight.CONFIG.APP.REMOTE_LOGGING = False
MODEL = os.environ["STEERLENS_REMOTE_MODEL"]  # a folder that client and server both see; on NDIF a repository's name
tokenizer = AutoTokenizer.from_pretrained(MODEL)

# %% [markdown]
# ## Fit where the weights are
#
# The gains of A-LQR need Jacobians, so this part needs the weights. Everything after it does not.

# %%
local = nnsight.TransformersModel(
    MODEL, tokenizer=tokenizer, task="text-generation", dispatch=True, dtype=torch.float32
)
pairs = sl.shipped("ocean")
controller = sl.lqr(local, pairs, level=2.0, linearize_on=2, progress=False)
controller

# %% [markdown]
# ## Steer without weights
#
# This model is a skeleton: its parameters are on the meta device, and stay there.

# %%
lm = nnsight.TransformersModel(MODEL, tokenizer=tokenizer, task="text-generation")
options = {"max_new_tokens": 16, "do_sample": False}

with sl.steer(lm, controller) as run:
    tokens = lm.generate("My weekend was", **options, remote=True)

print(tokenizer.decode(tokens[0]))
print(f"{run.payload_bytes / 1e3:.0f} kB were sent; weights here: {lm.dispatched}")

# %% [markdown]
# ## The record came back
#
# It equals the record of the same generation on local weights, number by number.

# %%
with sl.steer(local, controller) as here:
    expected = local.generate("My weekend was", **options)

difference = max(float((here.record[name] - run.record[name]).nan_to_num().abs().max()) for name in here.record)
print("same tokens:", torch.equal(expected.cpu(), tokens.cpu()))
print("largest difference in the record:", difference)

# %%
run.plot()

# %% [markdown]
# ## Fit on the server
#
# Contrast vectors only need activations. `sl.remote(lm)` stands for the model in a fit: the texts are run on the
# server and pooled there, and one vector per text comes back. (Fits that need gradients of a loss work in the same way,
# on a server that trusts you.)

# %%
caa = sl.caa(sl.remote(lm), pairs, layers=15)
with sl.steer(lm, caa) as run:
    print(tokenizer.decode(lm.generate("My weekend was", **options, remote=True)[0]))

# %% [markdown]
# ## Two controllers in one batch
#
# `apply` steers from inside a block: here the first row of a batch with A-LQR, the second with the contrast vectors.
# The names that `apply` gives bring the two records back.

# %%
with lm.generate(**options, remote=True) as tracer:
    with tracer.invoke("My weekend was"):
        with_lqr = sl.apply(lm, controller)
    with tracer.invoke("My weekend was"):
        with_caa = sl.apply(lm, caa)
    with tracer.invoke():
        both = tracer.result.save()

for name, row, applied in zip(("A-LQR", "CAA"), both, (with_lqr, with_caa), strict=True):
    print(f"{name}, {len(applied.record)} recorded: {tokenizer.decode(row)!r}")

# %% [markdown]
# ## What this notebook does not show
#
# Speed: the server that built it is a process on the same two CPU cores. Nor an untrusted server, where the same calls
# work but take seconds longer each.
