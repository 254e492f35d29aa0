# %% [markdown]
# # 4. Closed loop: when feedback pays, and when it does not
#
# **The verdict first.** If nothing disturbs the model, feedback buys nothing here: at equal KL a small fixed push at every
# layer does as well, and better than A-LQR with its defaults. If something pushes back, feedback pays: fixed vectors lose
# a quarter to two fifths of their effect, the loops between nothing and a seventh. And the shift by a vector at one layer
# arrives halved and fades along a text; spread over the layers, with feedback or without, it stays.
#
# **You will see** SmolLM2-135M steered towards delight by a fixed vector at one layer, fixed vectors at every layer, and
# A-LQR with three settings, all at the same KL from the unsteered model: what they reach, what stays when something else
# pushes back, and what stays of it over a long text. **Time:** under three minutes on two cores; no GPU.

# %%
import pandas as pd
import plotly.graph_objects as go
import torch

import steerlens as sl
from steerlens.evaluate import Arm, Bench, generate_texts, kl, propensity
from steerlens.models import smollm2

model = smollm2()
dev = sl.shipped("sentiment", split="dev", read="completion")
prompts = sl.shipped_texts("prompts", split="dev")[:6]

# %% [markdown]
# ## Five controllers, one price
#
# With $v_t$ the unit direction of the mean difference before block $t$ and $\mu_t$ its length:
#
# - **one layer**, **every layer** (open loop): $u_t = s\,\mu_t v_t$, whatever the state is.
# - **A-LQR**, with its defaults, asks for a *shift* of $\lambda\mu_t$ and holds it gently, most of it in late layers:
#   $u_t = K_t e_t$, $e_t = (\lambda\mu_t + \langle v_t, x^0_t\rangle - \langle v_t, x_t\rangle)\,v_t$ with $x^0_t$ the
#   unsteered state of the same token, from a second pass. **Firm**, with `q=0.1`, an error costs more at every layer.
# - **A-LQR from zero**, the setting of the paper, asks each token for the *same* value along $v_t$:
#   $e_t = (\lambda\mu_t - \langle v_t, x_t\rangle)\,v_t$.
#
# Strength multiplies a loop's gain, and too high a gain makes it unstable: choose a level that needs no strength above 1.

# %%
vectors = sl.caa(model, dev, layers="all")
texts = ["".join(text) for text in dev.positive[:2]]
plant = sl.linearize(model, texts, progress=False)
options = {"linearization": plant, "progress": False}
controllers = {
    "one layer": vectors.only([15]) * 2.5,
    "every layer": vectors * 0.1,
    "A-LQR": sl.lqr(model, dev, level=6, **options),
    "A-LQR, firm": sl.lqr(model, dev, level=2, q=0.1, **options),
    "A-LQR from zero": sl.lqr(model, dev, level=2, paper=True, **options),
}
for name, controller in controllers.items():
    fit = sl.calibrate(
        model,
        controller,
        prompts,
        budget=kl(tokens=10) <= 0.3,
        tolerance=0.1,
        progress=False,
    )
    controllers[name] = fit.controller
    found = f"strength {fit.strength:.2f}, KL {fit.value:.2f} ({fit.met})"
    print(f"{name:16} {found}")

# %% [markdown]
# ## Undisturbed, and against a disturbance
#
# The effect is how much likelier than an appalled completion the delighted one has become, per token, on 14 unseen pairs.
# Then the same with a second controller on the model, which pushes the other way with a fixed vector after block 12. An
# open loop cannot know of it; a loop sees the state pushed off and answers in the layers after.

# %%
against = vectors.only([12]) * -2
effect, bench = (
    propensity(sl.shipped("sentiment", split="held_out")[:14]),
    Bench(model, prompts),
)


def values(controller=None):
    """One number for each pair, as the model is steered."""
    return torch.tensor(effect(bench, Arm("steered", controller)))[:, 0]


def spread(change):
    """The mean, and half of a 95 % interval."""
    half = 1.96 * change.std() / len(change) ** 0.5
    return f"{float(change.mean()):+.2f} ± {float(half):.2f}"


plain = values()
free, pushed = {}, {}
for name, controller in controllers.items():
    free[name] = values(controller) - plain
    pushed[name] = values(controller + against) - plain
rows = {
    name: {
        "effect": spread(free[name]),
        "minus every layer": spread(free[name] - free["every layer"]),
        "effect when pushed": spread(pushed[name]),
        "lost to the push": spread(free[name] - pushed[name]),
    }
    for name in controllers
}
print(f"the push alone: {spread(values(against) - plain)}")
pd.DataFrame(rows).T

# %% [markdown]
# Undisturbed, the fixed pushes at every layer and the loop from zero do best, and the vector at one layer worst. The two
# loops that ask for a shift lie between: their intervals of the difference to the fixed pushes do not contain zero.
#
# The push costs the open loop at every layer two fifths of its effect, and the vector at one layer, which comes after the
# push, a quarter. What the loops lose is not distinguishable from zero: they see the state off its setpoint and add what is
# missing, the firmer the gains, the more of it. That is what feedback is for: when pushed, the loop from zero is far ahead
# of the open loops, and the other two no longer behind.
#
# ## What stays along a long text
#
# Each controller writes 40 tokens after three prompts. For each token, the shift along $v$ that is left after block 25:
# the steered state minus the unsteered state of the *same* text, in units of $\mu$.

# %%
layer, v = 25, vectors.loops[25].law.vector
hook = f"blocks.{layer}.hook_resid_post"
figure, table = go.Figure(), {}
for name, controller in controllers.items():
    shifts = torch.full((3, 40), torch.nan)
    texts = generate_texts(model, controller, prompts[:3], max_new_tokens=40)
    for row, text in enumerate(texts):
        ids = torch.tensor([[*text.prompt, *text.completion]])
        with torch.no_grad():
            _, plain = model.run_with_cache(ids, names_filter=hook)
            with (
                sl.steer(model, controller, record=None) as run,
                run.scoring(len(text.prompt)),
            ):
                _, steered = model.run_with_cache(ids, names_filter=hook)
        moved = (steered[hook] - plain[hook])[0, len(text.prompt) - 1 :]
        shift = (moved @ v) / v.square().sum()
        shifts[row, : min(40, len(shift))] = shift[:40]
    figure.add_scatter(y=shifts.nanmean(0).tolist(), name=name, mode="lines")
    table[name] = {
        "tokens 0-9": shifts[:, :10].nanmean(),
        "tokens 30-39": shifts[:, 30:].nanmean(),
    }
    table[name]["spread over tokens"] = shifts[~shifts.isnan()].std()
figure.update_xaxes(title_text="token (0: the last of the prompt)")
figure.update_yaxes(title_text="shift along v (units of μ)")
figure.update_layout(
    template="simple_white",
    width=900,
    height=420,
    title="What is left after block 25, mean of three texts",
)

# %%
pd.DataFrame(table).T.astype(float).round(2)

# %% [markdown]
# One layer's push is undone: by the thirtieth token of these three greedy texts nothing is left of it in the direction that
# it was made of. (Of twelve sampled texts of 64 tokens it keeps .5 in the first quarter and .4 in the last:
# `benchmarks/feedback.py`.) A push at every layer is renewed at every layer, and needs no feedback to stay. The firm
# loop keeps the shift most constant from token to token (the smallest spread), which is what it asks for; the loop
# from zero asks for a value, and its shift varies with what the text would have had. The first table shows that a
# constant shift did not help the text.
#
# ## What was not shown
#
# More than one behaviour, one small model, fourteen items and three texts; an interval over items does not include the luck
# of the prompts. `python benchmarks/feedback.py --task ocean` does the same with a concept: there, too, the loops keep more
# when pushed and none is better undisturbed, but A-LQR is no worse than the fixed pushes, and not the loop from zero but
# firm gains keep most. One disturbance, at one layer, along the very direction that is steered: a loop cannot reject what it
# does not measure. A loop that asks for a shift costs a second pass of the model at every token. Holding a feature of an
# autoencoder at a level, where feedback reaches exactly what is asked, is [tutorial 2](02_hold_a_feature.ipynb); the
# linear model behind the gains is tested in [a notebook of its own](../reproductions/lqr_linear_model.ipynb).
