"""Hold a direction, or several, at a level: on one side of it, or at it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from steerlens.control.targets import Origin
from steerlens.core import Controller, Loop
from steerlens.core.types import Layers, Where
from steerlens.fit.card import VECTORS, Card
from steerlens.fit.contrast import Pairs, Text
from steerlens.fit.directions import Bound, Levels, Unit, retune_held, tuned_levels
from steerlens.fit.method import method
from steerlens.fit.reading import check_vectors, pick_layers
from steerlens.fit.retune import Retune
from steerlens.hosts.types import Model
from steerlens.laws.feedback import Feedback
from steerlens.laws.relative import Relative
from steerlens.laws.setpoints import Range


@method(
    card=Card(needs="sets", points=VECTORS, concepts=True, vectors=True),
    retune=Retune(tuned_levels, retune_held),
)
def hold(
    model: Model,
    data: Pairs | Sequence[Pairs] | Tensor | Mapping[int, Tensor],
    *,
    level: float | Sequence[float] | None = None,
    unit: Unit | None = None,
    side: Bound = "at_least",
    trigger: float | Sequence[float] | None = None,
    origin: Origin | None = None,
    direction: Literal["mean", "probe"] = "mean",
    texts: Sequence[Text] | None = None,
    layers: Layers = None,
    point: str = "resid_post",
    strength: float = 1.0,
    where: Where = "last",
) -> Controller:
    """Hold the state's projection on a direction at least, at most, or exactly at a level.

        u = (beta - <v, x>) v   if <v, x> < beta   (`at_least`; `at_most`: if it is greater; `at`: always),   else 0

    the smallest control with which the token has the level; a token that has it already is left alone. Unlike an added
    vector it does not push further what is there, and unlike `lqr` it acts at each layer by itself.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model.
        data: Contrast texts, whose mean difference is v; a list of them, one for each direction of a plane or subspace;
            or directions of your own: `[d]`, rows `[m d]`, or a mapping from layer to such tensors. Their lengths do
            not matter. A direction outside its level is moved there and the others stay where they are, also if the
            directions overlap.
        level: What <v, x> is held at, in the unit below; one number, or one for each direction. Default: 1.5
            class separations, or a logit of 0.
        unit: `"separation"`, the default for texts: beta = level mu + origin, with mu = <v, mean(x+) - mean(x-)>;
            `"activation"`, the default for directions of your own: beta = level + origin; `"quantile"`: beta is the
            quantile, in (0, 1), of <v, x> over all tokens of `texts` but those at position 0, at each layer;
            `"logit"`, for a probe: where the log-odds of the positive side, `<w, x> + b`, are `level`.
        side: `"at_least"`, `"at_most"` or `"at"`.
        trigger: Act only on tokens below this level (above it, for `"at_most"`), in the same unit. By default every
            token on the wrong side of `level` is moved.
        origin: What separations and activations are counted from: `"negative"`, the negative texts' mean, the default
            for separations; `"zero"`, the default for activations; `"midpoint"` of the two means; or `"own"`: the
            unsteered state of the same token, so that what it varies by itself is kept. Then an unsteered pass
            accompanies the steered one, see `lqr`.
        direction: `"mean"`, or `"probe"`: v = w / |w| of a logistic regression (C = 1) on the texts' activations.
        texts: For quantiles; default: those of `data`, both sides.
        layers: Where to act; default the middle layer, or those of the mapping.
        point: Point of the block, see `Site`.
        strength: Factor on the control, no unit: 0 is off, 1 reaches the level, 2 mirrors the token at it.
        where: Token positions, see `Loop`.

    Returns:
        One loop per layer. The recipe holds the levels in activation units. Recorded signals: `error`, |beta - <v, x>|
        where it acts, and `projection`, <v, x> before the control (`projection_0`, `projection_1`, ... for several
        directions), in activation units; `acted`, 1 where it acts and otherwise 0, whose mean is the share of tokens
        acted on; with `origin="own"` also `reference`, <v, x> unsteered; `u`; `u_norm`; each `[batch pos]`.

    Raises:
        TypeError: data of another kind, directions that hold no numbers.
        ValueError: an unknown option, or options that do not go together; a level that is missing, not finite, or no
            quantile; a trigger on the wrong side of the level; directions that are zero or linearly dependent, or of
            another width; a layer or point the model does not have; sides with identical activations at a layer.

    Without a refit, by `controller.retuned`: `level`, `trigger`, but no quantile.

    Source: activation capping (Lu et al., arXiv 2601.10387) is `side="at_least", unit="quantile", level=0.25` at some
    late layers with `where="all"`; the authors take the quantile over mean activations of responses, here it is over
    tokens. Steering to a target projection (StTP, Herbster et al., arXiv 2604.08169) is `direction="probe"` with
    `level=1` and a `trigger`; to a mirror projection (StMP) `direction="probe", unit="logit", level=0, strength=2`. The
    linear barrier of BarrierSteer (arXiv 2602.20102), the least u with <w, x + u> + b >= margin, is
    `direction="probe", unit="logit", level=margin`. Not reproduced: learned barriers that are not linear, their
    merging, and their condition on the change from one token to the next; the layers and thresholds of StTP and StMP.
    """
    check_vectors("hold", point)
    asked = Levels(data, level, unit=unit, side=side, trigger=trigger, origin=origin, direction=direction, texts=texts)
    sites = pick_layers(model, asked.layers if layers is None else layers, point, default="middle")
    held = asked.at(model, sites)
    loops = []
    for site, at in held.items():
        law = Feedback(Range(at.directions, *at.bounds), at.directions)
        relative, reference = (Relative(law), site) if asked.own else (law, None)
        loops.append(Loop(relative, site, where=where, strength=strength, reference=reference))
    return Controller(loops, {"levels": [at.levels.tolist() for at in held.values()], **asked.found(held)})
