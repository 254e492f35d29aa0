# %% [markdown]
# # A feature of a sparse autoencoder as a setpoint
#
# "Steer with feature 1234" usually means: add its decoder row, times a number that was found by trying. You will see
# what that does to the feature itself, then hold the feature at a level instead: the autoencoder's encoder is the
# sensor, and a feedback law adds what is missing, token by token. Last, the same level is reached from the layers before,
# with less control. About a minute on two cores; no GPU, no network.

# %%
import plotly.graph_objects as go
import torch

import steerlens as sl
from steerlens.core import Loop
from steerlens.laws.feedback import Add
from steerlens.models import smollm2, smollm2_sae

torch.set_num_threads(2)
model, sae = smollm2(), smollm2_sae()
print(sae.cfg.architecture(), tuple(sae.W_dec.shape), sae.cfg.metadata.hook_name)

# %% [markdown]
# The autoencoder is a slice of one that sae-lens trained on SmolLM2's own writing; `steerlens/data/sae/README.md` has the
# recipe and the quality. With a network, `sae_lens.SAE.from_pretrained("gemma-scope-2b-pt-res-canonical",
# "layer_12/width_16k/canonical")` and a model that fits it take its place; nothing below changes.
#
# ## Find a feature
#
# `rank_features` sorts all features by how well they tell texts about the sea from other texts. `describe` shows where
# one is on; the top contexts say more about its meaning than any label.

# %%
pairs = sl.shipped("ocean", read="mean")
table = sl.sae.rank_features(model, sae, pairs)
table.head(5).round(2)

# %%
index = int(table[table.effect > 0].index[0])
sl.sae.describe(model, sae, index, pairs.positive + pairs.negative, top=6)

# %% [markdown]
# ## Add its decoder row, or hold it
#
# The level is a high one among the feature's own readings in the texts about the sea, the 0.8 quantile where it is on. The fixed vector is
# scaled so that it raises the feature by exactly that much, if it was at 0. `observe` only measures: composed after a
# controller, it measures what the controller has reached.

# %%
target = sl.sae.feature(sae, index, quantile=0.8, model=model, texts=pairs.positive)
level = target.at_least[0]
held = sl.sae.hold(model, target)
row = target.setpoint.basis[0]
added = sl.Controller([Loop(Add(row * level / float(row @ target.setpoint.sensor[0])), target.site)], held.recipe)


def generate(controller: sl.Controller, prompt: str = "My weekend was") -> tuple[str, sl.Run]:
    with sl.steer(model, controller + sl.sae.observe(model, target, where="last")) as run:
        return model.generate(prompt, max_new_tokens=30, do_sample=False, verbose=False), run


def reading(run: sl.Run) -> list[float]:
    return run.record[f"blocks.{target.site.layer}.hook_steer_observe_feature"][0, -30:].tolist()


figure = go.Figure()
for name, controller in {"unsteered": held * 0, "decoder row added": added, "held": held}.items():
    text, run = generate(controller)
    print(f"{name}: {text}\n")
    figure.add_scatter(y=reading(run), name=name, mode="lines+markers")
figure.add_hline(y=level, line_dash="dash", annotation_text="asked")
figure.update_layout(template="simple_white", width=900, height=400, title=f"Feature {index} along a generation")
figure.update_xaxes(title_text="token (0: the last of the prompt)")
figure.update_yaxes(title_text="reading (autoencoder's units)")

# %% [markdown]
# The fixed vector raises the feature by the same amount everywhere: too little where something works against it, too
# much where the text is about the sea already. The loop adds what is missing, and takes away what is too much.
#
# What the autoencoder does not explain is kept: the control lies along the decoder row, and the rest of the residual
# stream, the autoencoder's error included, passes untouched.
#
# ## Ranges
#
# A range asks for nothing while the feature is inside it: `at_least` leaves the model alone at tokens where the feature
# is high enough by itself, and `level=0` turns a feature off where it would be on. The loop's `u_norm` shows where it
# acted.

# %%
prompt = "The ship sailed out on the ocean, and the waves"
for name, aim in {
    "unsteered": None,
    "at least 15": sl.sae.feature(sae, index, at_least=15),
    "off": sl.sae.feature(sae, index, level=0),
}.items():
    text, run = generate(sl.sae.hold(model, aim) if aim else held * 0, prompt)
    spent = run.record[f"blocks.{target.site.layer}.hook_steer_hold_u_norm"][0, -30:]
    print(f"{name}: acted on {int((spent > 0).sum())} of 30 tokens: {text}\n")

# %% [markdown]
# ## Reach it from earlier layers
#
# `reach` pulls the encoder row back through the blocks by gradients and lets each layer answer what it predicts the
# feature will be: the controls of least energy that reach the level, by the linear model. The last loop senses the
# feature itself and closes what is left. Blocks are linearised at the last tokens of eight other texts.

# %%
prompts = ["My weekend was", "The committee has decided that", "When the door opened, she", "Yesterday I bought a new"]
layer = target.site.layer
led = sl.sae.reach(model, target, pairs.negative[:8], layers=range(layer - 7, layer + 1), progress=False)
reached = sl.diagnose.reach(model, led, target, prompts)
reached.table().round(2)

# %%
reached.plot()

# %% [markdown]
# Asked and reached agree because the last loop measures. The prediction is that of a linear model for the controls that
# acted; where it is off, the blocks are curved. `least` is the energy that would have been enough had each layer known
# the linear model of this very prompt.
#
# What it costs, by layer, against acting at the feature's layer alone. Part of what is saved is the direction: the decoder
# row is not the shortest way to raise a feature. `benchmarks/sae.py` also holds it along the encoder row.

# %%
figure = go.Figure()
for name, controller in {"held": held, "led": led}.items():
    _, run = generate(controller)
    energy = {at: float(value[0, -30:].square().mean()) for at, value in run.record.layers("u_norm").items()}
    figure.add_bar(x=list(energy), y=list(energy.values()), name=f"{name}, {sum(energy.values()):.0f} in all")
figure.update_layout(template="simple_white", width=900, height=400, title="Control energy by layer, mean over tokens")
figure.update_xaxes(title_text="layer", dtick=1)
figure.update_yaxes(title_text="|u|^2 (squared units of the residual stream)")

# %% [markdown]
# ## Out of reach
#
# Far enough out the linear model says nothing, and the control would replace the state instead of steering it. `reach`
# refuses a level that needs more than the norm of the residual stream, and says what is within it.

# %%
try:
    sl.sae.reach(
        model, sl.sae.feature(sae, index, level=100 * level), pairs.negative[:8], layers=[layer], progress=False
    )
except ValueError as error:
    print(error)

# %% [markdown]
# ## What this notebook does not show
#
# That holding a feature makes a better text: a feature of a small autoencoder is rarely a concept, and one that is held
# at every token, also where no text would have it, drives a small model off its distribution. Nor that the feature
# *causes* what is written: for that, see how the effect travels through the circuit. It shows that what was asked for is
# what is measured.
