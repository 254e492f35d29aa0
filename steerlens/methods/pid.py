"""S-PID: proportional, integral and derivative feedback over the layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

from steerlens.control.targets import AIMS, Aim, Combine, Origin, Tracked, found_of, retune_targets, tuned
from steerlens.core import Controller, Loop
from steerlens.core.law import finite
from steerlens.core.types import Json, Layers, Where
from steerlens.fit.card import Card
from steerlens.fit.contrast import Pairs
from steerlens.fit.method import method
from steerlens.fit.reading import every_layer
from steerlens.fit.retune import Draft, Retune, edited
from steerlens.hosts.types import Model
from steerlens.laws.feedback import Pid
from steerlens.sae.feature import FEATURE_LEVELS, Target, retune_features, targets_of

GAINS = ("kp", "ki", "kd")


def _retune(draft: Draft) -> None:
    gains = {name: finite(name, draft.arguments[name]) for name in GAINS}
    _check_gains(**gains)
    draft.laws(lambda law, loop: edited(law, **gains))
    retune_features(draft) if "targets" in draft.found else retune_targets(draft)


def _names(recipe: Json) -> list[str]:
    return [*GAINS, *(FEATURE_LEVELS if "targets" in recipe["found"] else tuned(recipe["arguments"]))]


@method(
    card=Card(needs="sets", points=("resid_post",), prompt_passes=2, token_passes=2, concepts=True, features=True),
    paper={"origin": "zero", "level": 1.0, "kp": 0.7, "ki": 0.01, "kd": 0.1},
    only={"texts": [*AIMS, "level", "angle_rad", "layers", "paper"]},
    retune=Retune(_names, _retune),
)
def pid(
    model: Model,
    data: Pairs | Sequence[Pairs] | Target | Sequence[Target],
    *,
    level: float | Sequence[float] | None = None,
    setpoint: Tracked = "level",
    origin: Origin | None = None,
    angle_rad: float | None = None,
    combine: Combine = "joint",
    kp: float = 0.05,
    ki: float = 0.0,
    kd: float = 0.0,
    reset_every: int | None = 10,
    carry: bool = False,
    layers: Layers = None,
    strength: float = 1.0,
    where: Where = "last",
    paper: bool = False,
) -> Controller:
    """Track a semantic setpoint with a PID controller whose time is the layer.

        u_t = kp e_t + ki s_t + kd (e_t - e_{t-1}),   s_t = s_{t-1} + e_t
        e_t = (beta_t - <v_t, x_t>) v_t,   beta_t = s mu_t (+ origin)

    with mu_t v_t the mean difference of the contrast texts before block t. The error is sensed before each block and
    the control added after it. Nothing is linearised: fitting costs one forward pass for each text. Plain proportional
    feedback on a setpoint is `pid(model, data, kp=0.5, ki=0, kd=0)`.

    With features of autoencoders, `pid(model, sae.feature(sae, i, level=...), kp=1)`, the errors are those of the
    targets, each sensed and answered at its own site, and time counts these sites:
    `e_t = (z* - z_t(x)) d / <w_enc, d>`, with z the pre-activation, z* the nearest one in the range and d the target's
    direction. With `kp=1` alone it is `sae.hold` at each.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model.
        data: Contrast texts, or a list of them, one for each concept, as for `lqr`; or a target from `sae.feature`, or
            a list of them at different sites.
        level, setpoint, origin, angle_rad, combine: What to track, as for `lqr`.
        kp, ki, kd: Gains, no unit. The paper's are 0.7, 0.01 and 0.1 for Gemma-2-2B; over its models kp is 0.1 to 0.7,
            ki 0.01 to 0.5 and kd 0 to 0.1. A gain may be 0.
        reset_every: Set the sum s to zero at the layers that this number divides, the first included, as the paper does
            every 10 layers; the error of such a layer then enters no sum. None: never.
        carry: Begin the first layer with the last layer's error of the token generated before, as the authors' code
            does, so that kd also damps changes between tokens. By default each token begins from zero, and steering
            without a KV cache equals steering with one. With `carry` it does not: a pass without a cache computes all
            tokens at once, each of them with the error at which the pass before it ended.
        layers: Where to act; default all. Time counts these layers only. Features have their own.
        strength: Factor on the control, no unit: 0 is off.
        where: Token positions, see `Loop`. The paper steers the last one.
        paper: Take the paper's setting for what is not given: `origin="zero"`, `level=1`, `kp=0.7`, `ki=0.01`,
            `kd=0.1`.

    Returns:
        One loop per layer, from the first at which the texts differ. Recorded signals: `[batch pos]`, in activation
        units, `error` and `projection` (`projection_0`, `projection_1` and so on for several concepts), with
        `origin="own"` also `reference` (`reference_0`, `reference_1` and so on), see `lqr`; `angle_rad`
        with the angular setpoint; for features `error` and `feature` (`feature_12`, ... for several), see `sae.hold`;
        `integral` and `derivative`, norms of s_t and e_t - e_{t-1}; `u`; `u_norm`.

    Raises:
        TypeError: data that are neither `Pairs` nor features.
        ValueError: a gain that is not finite, all three 0, an unknown option, a layer the model does not have, sides
            with identical activations at every layer. For features: an option of contrast texts, two targets at a
            site, an autoencoder that does not fit the model.

    Without a refit, by `controller.retuned`: `level`, `angle_rad`, `kp`, `ki`, `kd`; of features `level`, `at_least`,
    `at_most`.

    Source: S-PID in arXiv 2604.19018. Differences from the authors' code: each token begins from zero unless `carry`.
    """
    _check_gains(kp, ki, kd)
    if reset_every is not None and reset_every < 1:
        raise ValueError(f"reset_every={reset_every}; it is a number of layers, or None")
    gains = float(kp), float(ki), float(kd)
    features = targets_of(model, data)
    if features:
        loops = []
        for target in features:
            law = Pid(target.setpoint, *gains, reset=_resets(target.site.layer, reset_every), carry=carry)
            loops.append(Loop(law, target.site, where=where, strength=strength))
        return Controller(loops, {"targets": [target.arguments for target in features]})
    data = cast("Pairs | Sequence[Pairs]", data)
    aim = Aim(data, setpoint=setpoint, level=level, origin=origin, angle_rad=angle_rad, combine=combine)
    asked = every_layer(model, layers)
    targets = aim.targets(model)
    first = next((t for t in asked if targets.asks(t)), None)
    if first is None:
        raise ValueError("both sides have identical activations at every layer; are the texts the same?")
    loops = []
    # a carried error acts also at layers that have no direction of their own
    for t in asked if carry else asked[asked.index(first) :]:
        law = Pid(targets.setpoints[t], *gains, reset=_resets(t, reset_every), carry=carry)
        loops.append(targets.loop(t, law, where=where, strength=strength))
    return Controller(loops, found_of(targets))


def _check_gains(kp: float, ki: float, kd: float) -> None:
    if not all(map(math.isfinite, (kp, ki, kd))) or not any((kp, ki, kd)):
        raise ValueError(f"kp={kp}, ki={ki}, kd={kd}; the gains must be finite, and one of them other than 0")


def _resets(t: int, every: int | None) -> bool:
    return every is not None and t % every == 0
