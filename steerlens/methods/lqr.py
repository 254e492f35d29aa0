"""A-LQR: activation steering as a linear quadratic regulator over the layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from steerlens.contrast import Pairs, Text, tokenize
from steerlens.core import Controller, Loop, Site
from steerlens.fitting import contrast_means, recipe, resolve
from steerlens.hosts import Host
from steerlens.laws import Feedback
from steerlens.linearization import Linearization, stream
from steerlens.riccati import CostToGo
from steerlens.setpoints import Level


def lqr(
    model: Any,
    data: Pairs,
    *,
    strength: float = 1.0,
    q: float = 0.1,
    r: float = 1.0,
    qf: float = 0.1,
    origin: str = "zero",
    where: Any = "last",
    linearize_on: int | Sequence[Text] = 4,
    linearization: Linearization | None = None,
    full_gain: bool = False,
    progress: bool = True,
) -> Controller:
    """Track a semantic setpoint at every layer with the gains of a linear quadratic regulator.

    The blocks are a plant in the residual stream x of the token that is steered, linearised by their Jacobians A_t:

        x_{t+1} = f_t(x_t) + u_t,   u_t = K_t e_t,   e_t = (beta_t - <v_t, x_t>) v_t,   beta_t = s mu_t (+ origin)
        K_t = (S_{t+1} + R)^-1 S_{t+1} A_t,   S_t = Q + A_t' S_{t+1} (A_t - K_t),   S_T = Qf

    with mu_t v_t the mean difference of the contrast texts before block t. The error is sensed before each block and
    the control added after it, on the state as all earlier controls have left it. Only g_t = K_t v_t is kept: one dot
    product and one vector addition per layer and token.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model.
        data: Contrast texts; `Pairs.read` says which token's activation is used.
        strength: s, the setpoint in units of the class separation mu_t (lambda in the paper). 0 holds the feature at
            the origin, which is not the same as no steering: that is `controller * 0`.
        q, r, qf: Weights of the state, of the control and of the last state, times the identity; only their ratios
            matter. A larger r asks for less control.
        origin: Where beta is measured from: `"zero"` (the paper), `"negative"` (the negative texts' mean, so that
            strength 1 asks for the positive texts' mean) or `"midpoint"` of the two means.
        where: Token positions, see `Loop`. `"last"` is A-LQR; A-LQR+ steers all of them: `"all"`, or
            `slice(0, None)` with position 0, as in the authors' code.
        linearize_on: Texts whose last token the Jacobians are taken at and averaged over, or how many of the positive
            texts to take (fewer where there are fewer). Each costs d backward passes of every block for one token.
        linearization: Jacobians from `linearize`, used instead of `linearize_on`: a sweep over weights and strengths
            then costs seconds.
        full_gain: Keep K_t in `controller.loops[t].law.matrix`, `[d d]` per layer, for inspection.
        progress: Show a progress bar over the layers.

    Returns:
        One loop per layer, but none where all texts have the same activation: that is so at layer 0, which sees the
        token itself, whenever all texts end in the same token. Recorded signals: `error` `[batch pos]`, distance to
        the setpoint, and `projection` `[batch pos]`, `<v_t, x_t>`, in activation units; `u`; `u_norm`.

    Raises:
        ValueError: weights that are not positive, a text of one token to linearise on, an unknown origin, texts that
            give no difference at any layer, a linearization of another model.

    Warns:
        UserWarning: texts that give no difference at a layer after the first; it names the layers.

    Source: arXiv 2604.19018. Differences from the authors' code: exact Jacobians of one token against its KV cache
    instead of the whole sequence (equal, an order of magnitude faster); S symmetrised, in float64, and streamed
    backwards, so that no [T d d] tensor exists; position 0 is left alone by `where="all"`.
    """
    if origin not in ("zero", "negative", "midpoint"):
        raise ValueError(f"origin={origin!r}; it is 'zero', 'negative' or 'midpoint'")
    _check_weights(q=q, r=r, qf=qf)
    host = resolve(model)
    sites = [Site(t, "resid_pre") for t in range(host.n_layers)]
    if linearization is None:
        tokens = _nominal_tokens(host, data, linearize_on)
        plant, n_texts = stream(host, tokens, progress=progress), len(tokens)
    else:
        _check_plant(host, linearization)
        plant, n_texts = linearization.backwards(), linearization.n_texts
    positive, negative = contrast_means(host, data, sites)
    direction, level = {}, {}
    for site in sites:
        difference = positive[site] - negative[site]
        mu = float(difference.norm())
        if mu > 0:
            v = difference / mu
            direction[site.layer] = v
            level[site.layer] = strength * mu + _offset(origin, v, positive[site], negative[site])
    _check_directions(direction, host.n_layers)
    loops = []
    for t, K in _gains(host, plant, q, r, qf):
        if t not in direction:
            continue
        setpoint = Level(direction[t], level[t])
        rows = (setpoint.basis.to(K) @ K.T).to(setpoint.basis.dtype).cpu()
        law = Feedback(setpoint, rows, matrix=K.to(setpoint.basis.dtype).cpu() if full_gain else None)
        loops.append(Loop(law, Site(t, "resid_post"), Site(t, "resid_pre"), where=where, name="lqr"))
    arguments = {
        "strength": strength,
        "q": q,
        "r": r,
        "qf": qf,
        "origin": origin,
        "linearized_on": n_texts,
        "mu": [float((positive[site] - negative[site]).norm()) for site in sites],
    }
    return Controller(sorted(loops, key=lambda loop: loop.act), recipe("lqr", host, arguments, data=data))


def _gains(
    host: Host, plant: Iterable[tuple[int, Tensor]], q: float, r: float, qf: float
) -> Iterator[tuple[int, Tensor]]:
    """Yields `(t, K_t)` from the last layer to the first; one Jacobian and one S exist at a time."""
    # float64 costs little beside the Jacobians; Apple's GPUs do not have it
    dtype = torch.float32 if host.device.type == "mps" else torch.float64
    cost = CostToGo.scalar(qf, host.d_model, dtype=dtype, device=host.device)
    for t, A in plant:
        yield t, cost.step(A, q, r)


def _nominal_tokens(host: Host, data: Pairs, linearize_on: int | Sequence[Text]) -> list[list[int]]:
    if isinstance(linearize_on, int):
        if linearize_on < 1:
            raise ValueError(f"linearize_on={linearize_on}; at least one text is needed")
        side = data[:linearize_on].sides(host)[0]
        # up to the token that is read, where a single one is
        return [ids[: _last_read(weights) + 1] for ids, weights in zip(side.tokens, side.weights, strict=True)]
    return [tokenize(text, host, data.prepend_bos)[0] for text in linearize_on]


def _check_plant(host: Host, linearization: Linearization) -> None:
    differences = host.differences(linearization.model)
    if differences:
        raise ValueError(f"the linearization is of another model: {'; '.join(differences)}")


def _last_read(weights: Sequence[float]) -> int:
    return max(position for position, weight in enumerate(weights) if weight)


def _offset(origin: str, v: Tensor, positive: Tensor, negative: Tensor) -> float:
    if origin == "zero":
        return 0.0
    return float(v @ (negative if origin == "negative" else (positive + negative) / 2))


def _check_weights(**weights: float) -> None:
    for name, value in weights.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name}={value}; the weights of the regulator must be positive and finite")


def _check_directions(direction: dict[int, Tensor], n_layers: int) -> None:
    if not direction:
        raise ValueError("the texts give no difference at any layer; are both sides the same?")
    zero = [t for t in range(1, n_layers) if t not in direction]
    if zero:
        warnings.warn(f"the texts give no difference at layers {zero}: they are not controlled", stacklevel=3)
