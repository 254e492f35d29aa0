# %% [markdown]
# # 3. Choose layer and strength, and see the damage
#
# **You will see** where two kinds of text are apart in SmolLM2-135M, what a steering vector does at each layer and
# strength and what it costs, a strength chosen by a budget, and three methods at one price beside random directions and
# a prompt. **Time:** about two minutes on two cores; no GPU.

# %%
import steerlens as sl
from steerlens.evaluate import kl, propensity
from steerlens.models import smollm2

model = smollm2()

# %% [markdown]
# ## An aim that is a number
#
# The data are prompts with a delighted and an appalled completion, in two halves. One half is to fit on. On the other,
# the effect is how much likelier than the appalled completion $a^-$ the delighted one $a^+$ has become, per token:
#
# $$m = \frac{1}{|a^+|}\log p(a^+ \mid \text{prompt}) - \frac{1}{|a^-|}\log p(a^- \mid \text{prompt})$$

# %%
dev = sl.shipped("sentiment", split="dev", read="completion")
effect = propensity(sl.shipped("sentiment", split="held_out")[:14])
print(*dev.positive[0], "|", dev.negative[0][1])

# %% [markdown]
# ## A cheap first look: where are the two sides apart?
#
# The direction is fitted on some of the texts and scored on others; AUC is the probability that a delighted text lies
# further along it than an appalled one, and 0.5 is chance. This takes one pass over the texts for all layers.

# %%
apart = sl.separation(model, dev)
figure = apart.plot().update_yaxes(range=[0.4, 1.02])
figure.add_hline(
    y=0.5,
    line={"dash": "dash", "color": "grey", "width": 2},
    opacity=1,
    annotation_text="chance",
)

# %% [markdown]
# From layer 14 on nearly every layer separates the sides. So this does not choose a layer: separable is not steerable.
# What moves the output has to be measured.
#
# ## Sweep
#
# $x \leftarrow x + s\,v$ at one layer, for three layers and three strengths. The price is the KL divergence of the next
# token's distribution from the unsteered one, per token of what the unsteered model writes.

# %%
layers, strengths = [5, 15, 25], [1, 2, 4]
vectors = {layer: sl.caa(model, dev, layers=layer) for layer in layers}
found = sl.sweep(
    model,
    lambda layer, strength: vectors[layer] * strength,
    effect,
    layers=layers,
    strengths=strengths,
    damage=[kl(tokens=12)],
    max_new_tokens=12,
    progress=False,
)
found.plot()

# %%
found.choose("KL", 0.3)

# %% [markdown]
# Read the picture from left to right: at the same KL, which layer has the most effect? `choose` takes the best row
# within the budget on every second item and reports it on the others, so the number is not the best of nine. The
# intervals (a bootstrap over items) overlap widely: neighbouring layers cannot be told apart with so few items.
#
# ## A strength from a budget
#
# Between the rows of the grid, `calibrate` searches the strength that spends a budget, on prompts of its own. Its
# interval says how far another set of prompts would move it.

# %%
layer = int(found.choose("KL", 0.3).arm.removeprefix("layer "))
prompts = sl.shipped_texts("prompts", split="dev")[:8]
budget = kl(tokens=12) <= 0.3
vector = vectors[layer]
fit = sl.calibrate(model, vector, prompts, budget=budget, progress=False)
print(fit)
fit.table().round(3)

# %% [markdown]
# ## Methods at one price, and what else they break
#
# `compare` calibrates each method to the budget on half of the prompts and reports the rest on the other half, beside
# random directions of the same size and a plain instruction. `wrong way` is the share of items that moved against the
# aim, and `neutral loss` the loss on sentences that have nothing to do with the aim. By default `fluency` is measured
# too: how likely the steered texts are to the unsteered model. With eight prompts a half, a KL of 0.3 on one half may well
# be 0.2 on the other.

# %%
methods = {
    f"caa, layer {layer}": vector,
    "caa, every layer": sl.caa(model, dev, layers=range(30)) * 0.1,
    "odesteer": sl.odesteer(model, dev),
}
compared = sl.compare(
    model,
    methods,
    effect,
    budget=budget,
    prompts=sl.shipped_texts("prompts")[:16],
    damage=[sl.evaluate.neutral_loss()],
    baselines=(
        "unsteered",
        "random",
        sl.prompt("Everything is described with delight and praise."),
    ),
    seeds=3,
    progress=False,
)
columns = ["strength", "effect", "low", "high", "wrong way", "KL mean"]
columns += ["neutral loss"]
compared.table()[columns].round(2)

# %%
compared.plot()

# %% [markdown]
# A method counts only if its interval lies above the random directions and above zero. Then compare two of them item by
# item, which is sharper than to look whether two intervals overlap:

# %%
mean, low, high = compared.difference("caa, every layer", f"caa, layer {layer}")
print(
    f"every layer minus one layer: {mean:+.2f} [{low:+.2f}, {high:+.2f}]",
    "nats per token",
)

# %% [markdown]
# `compared.card()` gives tables, protocol and versions as Markdown, for an appendix.
#
# ## What was not shown
#
# Whether people find the texts more delighted: a difference of log-probabilities also grows if the unwanted text becomes
# unlikely because everything does, which is why KL and loss stand beside it. Knowledge, reasoning and longer
# texts were not measured; `sl.evaluate.lm_eval` and `sl.evaluate.inspect_ai` connect to the harnesses that do. Fourteen
# items and one small model rank nothing beyond doubt.
