# %% [markdown]
# # 7. The same controller in nnsight, here and on a server
#
# **You will see** a controller fitted and used on an nnsight model, two controllers in the rows of one batch, and the
# same calls sent to an NDIF server that holds the weights, from a client that has none. **Time:** about a minute on two
# cores; no GPU.
#
# Without an API key all of it runs on your machine. To send it to NDIF, set the key as nnsight's documentation says
# (`nnsight.CONFIG.set_default_api_key`, or the environment's `NDIF_API_KEY`) and name a model that the cluster serves.
# The outputs below are those of a server.

# %%
import nnsight
import torch

import steerlens as sl
from steerlens.models import smollm2

REMOTE = bool(nnsight.CONFIG.API.APIKEY)
local = smollm2(host="nnsight")
name, tokenizer = local.name_or_path, local.tokenizer
print(type(local).__name__, "on a server" if REMOTE else "here")

# %% [markdown]
# ## Fit where the weights are
#
# A fit that reads activations works on a server too (below). The gains of A-LQR need Jacobians, so this one is made
# here; Jacobians at two texts are enough for an example.

# %%
pairs = sl.shipped("ocean", split="dev", read="mean")
controller = sl.lqr(local, pairs, linearize_on=2, progress=False)
controller

# %% [markdown]
# ## Steer on the server
#
# `lm` is the model as a client of a cluster has it: a skeleton whose parameters are on the meta device. With
# `remote=True` the request carries the controller's tensors and the source of its laws, and no weights.

# %%
lm = (
    nnsight.TransformersModel(
        name,
        tokenizer=tokenizer,
        task="text-generation",
    )
    if REMOTE
    else local
)
options = {"max_new_tokens": 16, "do_sample": False}
prompt = "My weekend was"

with sl.steer(lm, controller) as run:
    tokens = lm.generate(prompt, **options, remote=REMOTE)

print(tokenizer.decode(tokens[0]))
if REMOTE:
    print(
        f"{run.payload_bytes / 1e3:.0f} kB were sent;",
        f"weights on this side: {lm.dispatched}",
    )

# %% [markdown]
# ## The record came back
#
# The same generation on local weights, compared number by number.

# %%
with sl.steer(local, controller) as here:
    expected = local.generate(prompt, **options)

difference = max(
    # NaN stands at tokens that are not steered
    float((here.record[key] - run.record[key]).nan_to_num().abs().max())
    for key in here.record
)
print(
    "same tokens:",
    torch.equal(expected.cpu(), tokens.cpu()),
    "- largest difference in the record:",
    difference,
)

# %%
run.record.plot(
    tokens=[tokenizer.decode([token]) for token in tokens[0].tolist()[:-1]],
)

# %% [markdown]
# ## Fit on the server
#
# `sl.remote(lm)` stands for the model in a fit: the texts are run on the server and pooled there, and one vector per
# text comes back.

# %%
caa = sl.caa(sl.remote(lm) if REMOTE else lm, pairs, layers=15) * 2
with sl.steer(lm, caa):
    print(tokenizer.decode(lm.generate(prompt, **options, remote=REMOTE)[0]))

# %% [markdown]
# ## Two controllers in one batch
#
# `apply` steers from inside a block of nnsight: here the first row of a batch with A-LQR, the second with the contrast
# vector. The names that `apply` is assigned to bring the two records back.

# %%
with lm.generate(**options, remote=REMOTE) as tracer:
    with tracer.invoke(prompt):
        with_lqr = sl.apply(lm, controller)
    with tracer.invoke(prompt):
        with_caa = sl.apply(lm, caa)
    with tracer.invoke():
        both = tracer.result.save()

for name, row, applied in zip(
    ("A-LQR", "CAA"),
    both,
    (with_lqr, with_caa),
    strict=True,
):
    print(
        f"{name}, {len(applied.record)} signals recorded:",
        f"{tokenizer.decode(row)!r}",
    )

# %% [markdown]
# ## What was not shown
#
# Speed: the server that made these outputs is a process on the same two cores. A server that does not trust you, where
# the same calls work and take seconds longer each, except those that need gradients, or a second pass of the model as the
# defaults of `lqr` do: there, take `lqr(..., origin="zero")`. What travels, what comes back, and what each kind of server
# allows is in [Steering on a remote cluster](../docs/remote.md).
