"""A feature of a sparse autoencoder as a setpoint at a site, and feedback at that site."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerlens.core import Controller, Loop, Site
from steerlens.core.types import Autoencoder, Json, Where
from steerlens.fit.contrast import Text, tokenize
from steerlens.fit.goal import Goal, goals_of
from steerlens.fit.recipe import digest, recipe
from steerlens.fit.retune import RETUNES, Draft, Retune, edited
from steerlens.hosts import Host, host_of
from steerlens.hosts.types import Model
from steerlens.laws import single
from steerlens.laws.feedback import Feedback
from steerlens.pages.reprs import target_html
from steerlens.sae.reading import states_of
from steerlens.sae.setpoint import Feature
from steerlens.sae.slices import Origin, Slices, architecture, check_indices, cut, site_of

#: A bound at or below a threshold is put this share below it, so that rounding cannot leave the feature on.
OFF = 1e-3
#: Smallest cosine between a direction and the encoder row, and largest condition of several, with which one step is
#: trusted in float32.
COSINE, CONDITION = 1e-2, 1e4
#: What `Controller.retuned` changes of features without a refit.
FEATURE_LEVELS = ("level", "at_least", "at_most")


@dataclass(frozen=True)
class Target(Goal):
    """Features of an autoencoder, the range of their activations, and the site where they are measured. From `feature`.

    Attributes:
        setpoint: Measures and moves them; usable with any feedback law.
        site: Where the autoencoder was trained.
        indices: The features, as the autoencoder counts them.
        at_least, at_most: The range of each, in activation units of the autoencoder.
        origin: What the autoencoder's metadata contains about its model.
    """

    setpoint: Feature
    site: Site
    indices: tuple[int, ...]
    at_least: tuple[float, ...]
    at_most: tuple[float, ...]
    origin: Origin

    def check(self, model: Model) -> Host:
        """The model's host; raises ValueError if the autoencoder does not fit the model, see `Origin.check`."""
        host = host_of(model)
        self.origin.check(host, self.site)
        return host

    def _repr_html_(self) -> str:
        return target_html(self)

    @property
    def arguments(self) -> Json:
        """For a controller's recipe."""
        finite = [[b if math.isfinite(b) else None for b in bounds] for bounds in (self.at_least, self.at_most)]
        return {"features": list(self.indices), "at_least": finite[0], "at_most": finite[1], "site": str(self.site)}

    def digest(self) -> str:
        """A hash of the range, the site and the slices of the autoencoder."""
        held = self.setpoint
        slices = {"sensor": held.sensor, "bias": held.bias, "threshold": held.threshold, "basis": held.basis}
        return str(digest({**self.arguments, **slices}))


def feature(
    sae: Autoencoder,
    index: int | Sequence[int],
    *,
    level: float | Sequence[float] | None = None,
    at_least: float | Sequence[float] | None = None,
    at_most: float | Sequence[float] | None = None,
    quantile: float | None = None,
    model: Model | None = None,
    texts: Sequence[Text] | None = None,
    along: str = "decoder",
    site: Site | str | None = None,
) -> Target:
    """A level, or a range, that the activation of a feature of a sparse autoencoder should have.

        a(x) = max(z, 0) if z > theta else 0,   z = <w_enc, x> + b

    is the feature's activation. Encoder column, decoder row, biases, threshold and input normalisation are sliced out
    of it; neither the controllers made from it nor the files they save need sae-lens or the autoencoder.

    Args:
        sae: `sae_lens.SAE` of architecture standard, JumpReLU, gated, TopK or BatchTopK. TopK turns a feature off that
            is not among the k largest, whatever its own value: its pre-activation is held, and its activation is that
            or 0.
        index: The feature, or several, which are held at once.
        level: The activation that it should have, in units of the autoencoder; one number, or one for each feature. 0:
            off.
        at_least, at_most: A range instead; inside it nothing is done.
        quantile: The level as a quantile, in (0, 1), of the feature's activations on `texts`, over the tokens where it
            is on.
        model, texts: For `quantile`: the model and texts to read, position 0 left out.
        along: The direction to move along: `"decoder"`, what the feature writes; or `"encoder"`, the shortest way.
        site: Where the autoencoder was trained, if its metadata does not contain it.

    Returns:
        A target for `hold`, `lqr`, `pid`, `observe` and `diagnose.reach`; its `.setpoint` works with any feedback law.

    Raises:
        IndexError: no such feature.
        TypeError: not an autoencoder of sae-lens, or one of another kind.
        ValueError: no level, or a level given in more than one way; a level that the activation can never have, at or
            below its threshold; a feature that the direction does not move, or several that it cannot move apart; an
            autoencoder whose site is unknown or whose weights do not fit the model.
    """
    architecture(sae)
    indices = check_indices(sae, index)
    slices = cut(sae, indices)
    if along not in ("decoder", "encoder"):
        raise ValueError(f"along={along!r}; it is 'decoder' or 'encoder'")
    if quantile is not None:
        if model is None or texts is None:
            raise ValueError("quantile= refers to the feature's activations on texts; give model= and texts=")
        if level is not None or at_least is not None or at_most is not None:
            raise ValueError("give quantile or a level or a range, not two of them")
        level = _quantiles(sae, indices, quantile, model, texts, site)
    lower, upper = _range(len(indices), level, at_least, at_most)
    setpoint = place(slices, indices, lower, upper, along)
    return Target(setpoint, site_of(sae, site), tuple(indices), tuple(lower), tuple(upper), Origin.of(sae))


def place(slices: Slices, indices: Sequence[int], lower: list[float], upper: list[float], along: str) -> Feature:
    """The setpoint of slices in a range of activations.

    Raises:
        ValueError: a level at or below the threshold, a direction that does not move its feature, dependent features.
    """
    floors, ceilings = bounds(slices, indices, lower, upper)
    directions = slices.decoder if along == "decoder" else slices.sensor
    norms = directions.norm(dim=-1)
    basis = directions / torch.where(norms > 0, norms, 1)[:, None]
    moves = basis.double() @ slices.sensor.double().T
    cosines = moves.diagonal() / slices.sensor.double().norm(dim=-1)
    for name, cosine in zip(indices, cosines.tolist(), strict=True):
        if not cosine > COSINE:
            raise ValueError(
                f"feature {name} does not rise along its {along} row (cosine with the encoder row {cosine:.3f}); "
                "use along='encoder', or another feature"
            )
    scaled = moves / slices.sensor.double().norm(dim=-1)
    if torch.linalg.cond(scaled) > CONDITION:
        raise ValueError(f"features {list(indices)} cannot be moved apart: their rows are dependent; hold fewer")
    return Feature(
        slices.sensor,
        slices.bias,
        slices.threshold,
        floors,
        ceilings,
        basis,
        normalise=slices.normalise,
        labels=[str(name) for name in indices],
    )


def bounds(
    slices: Slices | Feature, indices: Sequence[int | str], lower: list[float], upper: list[float]
) -> tuple[Tensor, Tensor]:
    """The range of pre-activations that a range of activations asks for, `[m]` each.

    Raises:
        ValueError: a level at or below the threshold, or above what a normalised input can have.
    """
    floors, ceilings = [], []
    _check_normalised(slices, indices, lower)
    for name, theta, low, high in zip(indices, slices.threshold.tolist(), lower, upper, strict=True):
        if 0 < low <= theta:
            raise ValueError(
                f"feature {name} cannot have the activation {low:g}: it is 0 or above its threshold {theta:g}; "
                f"ask for more than {theta:g}, or for level=0"
            )
        floors.append(low if low > 0 else -math.inf)
        ceilings.append(high if high > theta else theta * (1 - OFF))
    return slices.bias.new_tensor(floors), slices.bias.new_tensor(ceilings)


def _check_normalised(slices: Slices | Feature, indices: Sequence[int | str], lower: list[float]) -> None:
    """A normalised input has norm sqrt(d): no activation exceeds `sqrt(d) |w| + b`."""
    if slices.normalise == "none":
        return
    most = slices.sensor.shape[-1] ** 0.5 * slices.sensor.norm(dim=-1) + slices.bias
    for name, low, bound in zip(indices, lower, most.tolist(), strict=True):
        if low >= bound:
            raise ValueError(
                f"feature {name} never reads {low:g}: the autoencoder normalises its input ({slices.normalise}), and "
                f"no activation exceeds {bound:.3g}"
            )


def hold(model: Model, target: Target, *, where: Where = "last") -> Controller:
    """Hold features at the autoencoder's site: feedback whose gain reaches the level in one step.

        u = (z* - z(x)) d / <w_enc, d>

    with d the decoder row (or the encoder row, `feature(along="encoder")`), z* the nearest pre-activation in the range.
    Afterwards the features have the level at every token that is steered. What the autoencoder does not explain is
    kept: u lies in the span of the features' own directions and the rest of x, the autoencoder's error included, is
    added back untouched. Other features whose encoder rows overlap with d change their activations.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model.
        target: From `feature`.
        where: Token positions, see `Loop`.

    Returns:
        One loop. Recorded signals: `error` `[batch pos]`, `|u|` in units of the residual stream; `feature`
        `[batch pos]`, the activation before the control, in units of the autoencoder (`feature_12`, ... for several);
        `u`; `u_norm`.

    Raises:
        TypeError: not a target.
        ValueError: the autoencoder is of another width, hook point or basis than the model.
    """
    host = checked("hold", model, target)
    law = Feedback(target.setpoint, target.setpoint.basis)
    return Controller([Loop(law, target.site, where=where, name="hold")], recipe("sae.hold", host, target.arguments))


def observe(model: Model, target: Target, *, where: Where = "all") -> Controller:
    """Measure features and do nothing: `u = 0`. As `steerlens.observe`, after a check that the autoencoder fits.

    Composed after a controller, `hold(...) + observe(...)`, it measures what the controller has reached: signals of
    loops at one site have the loop's name, `blocks.15.hook_steer_observe_feature`.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model.
        target: From `feature`; its range enters the signal `error` alone.
        where: Token positions, see `Loop`.

    Raises:
        TypeError, ValueError: as for `hold`.
    """
    host = checked("observe", model, target)
    loops = single.observe(target.setpoint, target.site, where=where).loops
    return Controller(loops, recipe("observe", host, target.arguments))


def checked(verb: str, model: Model, target: Any) -> Host:
    """The model's host; raises TypeError unless a target was given, and as `Target.check`."""
    if not isinstance(target, Target):
        raise TypeError(f"{verb}() takes a target, it got {target!r}; make one first: feature(sae, index, level=...)")
    return target.check(model)


def targets_of(host: Host, data: Any) -> list[Target]:
    """The targets that a method got as its data, in the order of their sites; none if it got contrast texts.

    Raises:
        ValueError: two at one site, and as `Target.check`.
    """
    targets = sorted((goal for goal in goals_of(data) if isinstance(goal, Target)), key=lambda each: each.site)
    for target in targets:
        target.origin.check(host, target.site)
    for one, other in itertools.pairwise(targets):
        if one.site == other.site:
            raise ValueError(f"two targets at {one.site}; give one there: feature(sae, [i, j], level=[a, b])")
    return targets


def retune_features(draft: Draft) -> None:
    """Another level or range for loops that each hold the features of a target at its site, see `new_ranges`."""
    by_site = new_ranges(draft)
    if by_site:
        draft.laws(lambda law, loop: edited(law, setpoint=moved(law.setpoint, *by_site[str(loop.act)])))


def new_ranges(draft: Draft) -> dict[str, tuple[list[float], list[float]]]:
    """The range that is asked for at each target's site, entered in the draft's recipe; empty if nothing is asked for.

    One number is for all features, a list for those of all targets in the order of their sites.
    """
    ranges = [draft.arguments] if "features" in draft.arguments else draft.found["targets"]
    asked = {name: draft.changes.get(name) for name in FEATURE_LEVELS}
    if all(value is None for value in asked.values()):
        return {}
    counts = [len(target["features"]) for target in ranges]
    lower, upper = _range(sum(counts), **asked)
    by_site = {}
    for target, count in zip(ranges, counts, strict=True):
        by_site[target["site"]] = lower[:count], upper[:count]
        target["at_least"], target["at_most"] = (
            [b if math.isfinite(b) else None for b in side[:count]] for side in (lower, upper)
        )
        lower, upper = lower[count:], upper[count:]
    for name in FEATURE_LEVELS:
        if "features" not in draft.arguments or name == "level":
            draft.arguments.pop(name, None)
    return by_site


def moved(setpoint: Feature, lower: list[float], upper: list[float]) -> Feature:
    """The same features in another range of activations."""
    floors, ceilings = bounds(setpoint, setpoint.labels, lower, upper)
    return edited(setpoint, lower=floors.to(setpoint.lower), upper=ceilings.to(setpoint.upper))


RETUNES["sae.hold"] = Retune(lambda recipe: FEATURE_LEVELS, retune_features)


def _range(count: int, level: Any, at_least: Any, at_most: Any) -> tuple[list[float], list[float]]:
    if level is not None and (at_least is not None or at_most is not None):
        raise ValueError("give a level or a range (at_least, at_most), not both")
    if level is None and at_least is None and at_most is None:
        raise ValueError("the feature has no level; give level=, at_least=, at_most= or quantile=")
    low = _each("level" if level is not None else "at_least", level if level is not None else at_least, count, 0.0)
    high = _each("level" if level is not None else "at_most", level if level is not None else at_most, count, math.inf)
    for a, b in zip(low, high, strict=True):
        if a > b:
            raise ValueError(f"at_least={a:g} is above at_most={b:g}")
    return low, high


def _each(name: str, value: Any, count: int, default: float) -> list[float]:
    if value is None:
        return [default] * count
    values = [float(value)] * count if isinstance(value, (int, float)) else [float(entry) for entry in value]
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} numbers for {count} features")
    for entry in values:
        if not entry >= 0 or math.isinf(entry):
            raise ValueError(f"{name}={entry:g}; an activation is 0 or more, and it must be finite")
    return values


def _quantiles(
    sae: Autoencoder,
    indices: list[int],
    quantile: float,
    model: Model,
    texts: Sequence[Text],
    site: Site | str | None,
) -> list[float]:
    if not 0 < quantile < 1:
        raise ValueError(f"quantile={quantile}; it lies between 0 and 1")
    at = site_of(sae, site)
    host = host_of(model)
    Origin.of(sae).check(host, at)
    setpoint = place(cut(sae, indices), indices, [0.0] * len(indices), [math.inf] * len(indices), "encoder")
    states = torch.cat([x[1:] for x in states_of(host, [tokenize(text, host)[0] for text in texts], at)])
    activations = setpoint.activation(setpoint.preactivation(states.to(setpoint.sensor)))
    levels = []
    for name, values in zip(indices, activations.unbind(-1), strict=True):
        on = values[values > 0]
        if not len(on):
            raise ValueError(
                f"feature {name} is off on all {len(values)} tokens of the texts; it has no quantile there"
            )
        levels.append(float(torch.quantile(on.double(), quantile)))
    return levels
