"""Reach a feature through the layers before it, with the least control."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from steerlens.control.linearization import Blocks, Linearization, Plant, check_plant
from steerlens.control.lowrank import FeatureCostToGo
from steerlens.core import Controller, Loop, Site
from steerlens.core.progress import bar
from steerlens.core.types import Layers, Where
from steerlens.fit.contrast import Text, tokenize
from steerlens.fit.reading import every_layer
from steerlens.fit.recipe import recipe
from steerlens.hosts.types import Model
from steerlens.laws.feedback import Feedback
from steerlens.sae.feature import Target, checked
from steerlens.sae.setpoint import Feature


def reach(
    model: Model,
    target: Target,
    texts: Sequence[Text],
    *,
    layers: Layers = None,
    r: float | Sequence[float] = 1.0,
    where: Where = "last",
    limit: float | None = 1.0,
    linearization: Linearization | None = None,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> Controller:
    """Reach features at their layer L through the layers before it, with the least control energy: output LQR.

        minimise  sum_t r_t |u_t|^2   subject to   z_L in its range,   x_{t+1} = f_t(x_t) + u_t

    The encoder rows at L are pulled back by gradients, `Z_t = W_enc A_L ... A_t`, and each layer acts on the feature
    that the linear model predicts for L if nothing more is done:

        u_t = Z_{t+1}' G_t^-1 (z* - z_predicted) / r_t,   z_predicted = Z_t (x_t - path_t) + z(path_L)
        G_t = sum_{s >= t} Z_{s+1} Z_{s+1}' / r_s

    over the layers s that act.

    This is the regulator of `lqr(solver="output", preview=True)` with a cost on the last state alone, whose weight is
    infinite. The layers before L act on a linear model; the loop at L senses where it acts and corrects the remaining
    error along the encoder row, so that the level is reached exactly. With `layers=[L]` it is `hold` along the encoder.
    How much energy the earlier layers save depends on how well the linear model of other texts predicts;
    `diagnose.reach` reports it.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model.
        target: From `feature`, at a `resid_post`; its `along` does not matter here.
        texts: Linearise at the last token of each; Jacobians and path are means over them.
        layers: Where to act, none after L; default all up to L. Without L the remaining error is not corrected.
        r: Price of control, one number or one for each of `layers`; only ratios matter.
        where: Token positions, see `Loop`.
        limit: Refuse a level for which the linear model needs, on the mean path, a control of more than this share of
            the residual stream's norm at L; None: no limit. Beyond it the linear model does not hold.
        linearization: From `linearize`, instead of the texts.
        prepend_bos: As in `Pairs`.
        progress: Show a progress bar over the layers.

    Returns:
        One loop a layer. Recorded signals: `error` `[batch pos]`, how far x would have to move here, in units of the
        residual stream; `feature` `[batch pos]`, the activation predicted for L (at L: the activation there), in units
        of the autoencoder (`feature_12`, ... for several); `u`; `u_norm`.

    Raises:
        ValueError: a layer after L, a target at another point than `resid_post`, an autoencoder with input
            normalisation, a level beyond the limit (the message has the bound), and as for `hold`.

    Source: arXiv 2604.19018, with the output z_L in the cost instead of the whole state, anticipated instead of sensed.
    """
    host = checked("reach", model, target)
    setpoint, last = target.setpoint, target.site.layer
    if target.site.point != "resid_post":
        raise ValueError(f"reach() needs a feature at a resid_post, this one is at {target.site}; use hold()")
    if setpoint.normalise != "none":
        raise ValueError(
            "reach() needs an activation that is affine in the state, but the autoencoder normalises its input "
            f"({setpoint.normalise}); use hold()"
        )
    acting = list(range(last + 1)) if layers is None else every_layer(host, layers)
    if acting[-1] > last:
        raise ValueError(f"layer {acting[-1]} comes after the feature's, {last}; give layers up to {last}")
    prices = dict(zip(acting, _prices(r, len(acting)), strict=True))
    plant: Plant
    if linearization is None:
        plant = Blocks(host, [tokenize(text, host, prepend_bos)[0] for text in texts])
    else:
        check_plant(host, linearization)
        plant = linearization
    # Apple's GPUs have no float64
    solve = torch.float32 if host.device.type == "mps" else torch.float64
    path = plant.states.cpu().double()
    sensor = setpoint.sensor.to(path)
    base = sensor @ path[last + 1] + setpoint.bias.to(path)
    cost = FeatureCostToGo(sensor.to(host.device, solve), math.inf)
    need = torch.minimum(torch.maximum(base, setpoint.lower.to(base)), setpoint.upper.to(base)) - base
    loops, energy, spent = [], torch.zeros(len(base), len(base)).to(base), torch.zeros(len(base), len(base)).to(base)
    for t in bar(range(last, acting[0] - 1, -1), desc="pulling back", progress=progress):
        pulled = plant.pull(t, cost.Z)
        if t not in prices:
            cost.coast(pulled, cost.Z[:0], 0.0)
            continue
        gram = (cost.Z @ cost.Z.T).cpu().to(base)
        energy, spent = energy + gram / prices[t], spent + gram / prices[t] ** 2
        outputs = cost.step(pulled, cost.Z[:0], 0.0, prices[t]).cpu().to(base)
        if t == last:  # sensed where it acts: nothing is predicted
            law = _respond(setpoint, sensor, setpoint.bias.to(base), outputs)
            loops.append(Loop(law, target.site, where=where, name="reach"))
        else:
            rows = pulled.cpu().to(base)
            law = _respond(setpoint, rows, base - rows @ path[t], outputs)
            loops.append(Loop(law, Site(t, "resid_post"), Site(t, "resid_pre"), where=where, name="reach"))
    dual = torch.linalg.solve(energy, need)
    least = float(dual @ spent @ dual)
    _check_limit(target, base, need, math.sqrt(least) / float(path[last + 1].norm()), limit)
    arguments = {**target.arguments, "layers": acting, "r": list(prices.values()), "linearized_on": plant.n_texts}
    arguments["predicted_energy"] = least
    return Controller(sorted(loops, key=lambda loop: loop.act), recipe("reach", host, arguments))


def _respond(setpoint: Feature, rows: Tensor, bias: Tensor, outputs: Tensor) -> Feedback:
    """The law that gives the control `(z* - z) @ outputs` for a predicted pre-activation `z = rows x + bias`."""
    basis = rows / rows.norm(dim=-1, keepdim=True)
    gains = basis @ rows.T @ outputs
    like = setpoint.sensor
    predicted = Feature(
        rows.to(like),
        bias.to(like),
        setpoint.threshold,
        setpoint.lower,
        setpoint.upper,
        basis.to(like),
        labels=setpoint.labels,
    )
    return Feedback(predicted, gains.to(like).contiguous())


def _check_limit(target: Target, base: Tensor, need: Tensor, share: float, limit: float | None) -> None:
    if limit is None or share <= limit:
        return
    if len(base) == 1:
        z = float(base + need * limit / share)
        reach = f"it reaches {max(z, 0.0):.3g}"
    else:
        reach = f"it goes {limit / share:.0%} of the way"
    names = ", ".join(map(str, target.indices))
    raise ValueError(
        f"feature {names}: the level needs a control of {share:.2f} times the residual stream's norm at {target.site} "
        f"by the linear model of these texts; within the limit of {limit:g} {reach}. Ask for less, act at more layers, "
        "or pass limit=None"
    )


def _prices(r: float | Sequence[float], count: int) -> list[float]:
    prices = [float(r)] * count if isinstance(r, (int, float)) else [float(entry) for entry in r]
    if len(prices) != count or not all(price > 0 and math.isfinite(price) for price in prices):
        raise ValueError(f"r={r!r}; give one positive price, or one for each of the {count} layers")
    return prices
