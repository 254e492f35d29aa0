"""From contrast texts to a setpoint before every block, for all methods that track one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor

from steerlens.core import Law, Loop, Setpoint, Site
from steerlens.core.law import finite
from steerlens.core.types import Json, Where
from steerlens.fit.contrast import Pairs
from steerlens.fit.reading import contrast_means, numbers
from steerlens.fit.retune import Draft, edited
from steerlens.hosts import Host
from steerlens.laws.feedback import Preview
from steerlens.laws.relative import Relative
from steerlens.laws.setpoints import Angle, Independent, Joint, Level

#: What is held along a direction: its coordinate, or the angle to it.
Tracked: TypeAlias = Literal["level", "angular"]

#: Where levels count from.
Origin: TypeAlias = Literal["own", "zero", "negative", "midpoint"]

#: Several concepts at once, or each as if it were alone.
Combine: TypeAlias = Literal["joint", "independent"]

#: The arguments of a method that become an `Aim`, in addition to the level and the angle.
AIMS = ("setpoint", "origin", "combine")

#: In units of the class separation. Measured, as the weights of `lqr` and the gains of `pid`: `docs/closed_loop.md`.
LEVEL = 2.0


class Targets:
    """A setpoint for the state before each block and after the last.

    Attributes:
        setpoints: One more than there are blocks.
        mu: `|mean difference|` of each concept at each, `[layer+1 concept]`, in activation units.
        own: Levels are counted from the token's own unsteered state.
        idle: So counted, every level is 0: no steering.
        start: Where levels are counted from, `[layer+1 concept]`; None: from zero or from the token's own.
    """

    def __init__(
        self,
        setpoints: list[Setpoint],
        mu: Tensor,
        *,
        own: bool = False,
        idle: bool = False,
        start: Tensor | None = None,
    ):
        self.setpoints = setpoints
        self.mu = mu
        self.own = own
        self.start = start
        self.idle = own and idle

    def loop(self, t: int, law: Law, *, where: Where, strength: float) -> Loop:
        """A law as the loop that senses before block t and acts after it."""
        sense = Site(t, "resid_pre")
        return Loop(
            Relative(law, self.idle) if self.own else law,
            Site(t, "resid_post"),
            sense,
            where=where,
            strength=strength,
            reference=sense if self.own else None,
        )

    def asks(self, t: int) -> bool:
        """Whether the texts differ before block t: if they do not, there is no direction to steer along."""
        return bool(self.mu[t].any())

    def levels(self, t: int) -> Tensor:
        """What `<v, x>` should be before block t, `[m]`, for each row of the setpoint's basis."""
        setpoint = self.setpoints[t]
        assert not isinstance(setpoint, Angle)
        return setpoint.level if isinstance(setpoint, Level) else setpoint.levels  # type: ignore[attr-defined]


class Aim:
    """What the user asked for, checked before any forward pass.

    Args:
        data: Contrast texts, or several, one for each concept.
        setpoint: `"level"` or `"angular"`.
        level: Level in units of the class separation; one for all concepts or one each; None: `LEVEL`.
        origin: Where levels are counted from: `"own"`, `"zero"`, `"negative"` or `"midpoint"`; None: `"own"`.
        angle_rad: Where the angular setpoint points, in radians from the direction of the positive texts.
        combine: How several concepts are held: `"joint"` or `"independent"`.

    Raises:
        ValueError: arguments that do not go together.
    """

    def __init__(
        self,
        data: Pairs | Sequence[Pairs],
        *,
        setpoint: Tracked,
        level: float | Sequence[float] | None,
        origin: Origin | None,
        angle_rad: float | None,
        combine: Combine,
    ):
        self.concepts = [data] if isinstance(data, Pairs) else list(data)
        count = len(self.concepts)
        self.levels = levels_of(level, count)
        if setpoint == "angular":
            if count > 1:
                raise ValueError(f"the angular setpoint takes one concept, data holds {count}")
            if level not in (None, 1.0) or origin not in (None, "zero"):
                raise ValueError(
                    "the angular setpoint keeps the state's own length: it has no level, and origin='zero'"
                )
            angle_rad = 0.0 if angle_rad is None else float(angle_rad)
            if not math.isfinite(angle_rad):
                raise ValueError(f"angle_rad={angle_rad}; it must be finite")
        elif angle_rad is not None:
            raise ValueError(f"angle_rad={angle_rad} belongs to setpoint='angular', not to {setpoint!r}")
        self.setpoint, self.origin, self.angle_rad, self.combine = setpoint, origin or "own", angle_rad or 0.0, combine

    def targets(self, host: Host) -> Targets:
        """Read the texts and place the setpoints.

        Raises:
            ValueError: an activation is not finite.
        """
        n = host.n_layers
        sites = [*(Site(t, "resid_pre") for t in range(n)), Site(n - 1, "resid_post")]
        means = []
        for pairs in self.concepts:
            sides = contrast_means(host, pairs, sites)
            means.append([torch.stack([side[site] for site in sites]) for side in sides])
        positive, negative = (torch.stack(side, 1) for side in zip(*means, strict=True))  # [layer+1 concept d]
        difference = positive - negative
        mu = difference.norm(dim=-1)
        v = difference / torch.where(mu > 0, mu, 1)[..., None]
        if self.setpoint == "angular":
            return Targets([Angle(plane, self.angle_rad) for plane in planes(difference[:, 0], v[:, 0])], mu)
        levels, start = mu * mu.new_tensor(self.levels), None
        if self.origin not in ("zero", "own"):
            start = (v * (negative if self.origin == "negative" else (positive + negative) / 2)).sum(-1)
            levels = levels + start
        kind = Joint if self.combine == "joint" else Independent
        setpoints: list[Setpoint] = [
            Level(v[t, 0], float(levels[t, 0])) if len(self.concepts) == 1 else kind(v[t], levels[t])
            for t in range(n + 1)
        ]
        return Targets(setpoints, mu, own=self.origin == "own", idle=not any(self.levels), start=start)


def levels_of(level: Any, count: int) -> list[float]:
    """The level of each concept: one number for all, or one each; None: `LEVEL`.

    Raises:
        ValueError: not as many numbers as concepts, or one that is not finite.
    """
    given = numbers("level", LEVEL if level is None else level)
    levels: list[float] = given if isinstance(given, list) else [given] * count
    if len(levels) != count:
        raise ValueError(f"level has {len(levels)} numbers for {count} concepts")
    if not all(math.isfinite(value) for value in levels):
        raise ValueError(f"level={level}; it must be finite")
    return levels


def found_of(targets: Targets) -> Json:
    """What a fit found, for the recipe: all that other levels need, see `retune_targets`."""
    found = {"mu": targets.mu[:-1].squeeze(-1).tolist()}
    return found | ({} if targets.start is None else {"start": targets.start[:-1].squeeze(-1).tolist()})


def predicted_of(targets: Targets, features: Mapping[int, list[tuple[int, int]]]) -> Json:
    """What other levels need of a fit with preview in addition: which features its laws predict, by layer and index."""
    # those of a later layer are the later ones of these
    return {
        "mu_after": targets.mu[-1].squeeze(-1).tolist(),
        "predicted": [list(row) for row in features[min(features)]],
    }


def tuned(arguments: Json) -> list[str]:
    """What `retune_targets` changes, by the arguments of the fit: the angle of an angular setpoint, else the level."""
    return ["angle_rad"] if arguments["setpoint"] == "angular" else ["level"]


def retune_targets(draft: Draft) -> None:
    """Another `level` or `angle_rad` for loops that sense before their block and hold a setpoint of `Aim`."""
    if "angle_rad" in draft.changes:
        angle = draft.changes["angle_rad"]
        angle = finite("angle_rad", 0.0 if angle is None else angle)
        draft.laws(lambda law, loop: edited(law, setpoint=Angle(law.setpoint.basis, angle)))
    if "level" in draft.changes:
        _relevel(draft)


def _relevel(draft: Draft) -> None:
    mu, start = draft.found["mu"], draft.found.get("start")
    count = len(mu[0]) if isinstance(mu[0], list) else 1
    new, old = levels_of(draft.changes["level"], count), levels_of(draft.before["level"], count)
    own = draft.arguments["origin"] in (None, "own")

    def ahead(targets: Tensor, t: int) -> Tensor:
        """Of the features that are predicted from before block t: levels, less constants that do not change."""
        rows = [(s, i) for s, i in draft.found["predicted"] if s > t]
        every = [*mu, draft.found["mu_after"]]
        scale = targets.new_tensor([every[s][i] if count > 1 else every[s] for s, i in rows])
        wanted, present = (scale * scale.new_tensor([levels[i] for _, i in rows]) for levels in (new, old))
        return wanted if own else targets + (wanted - present)

    def change(law: Any, loop: Loop) -> Law:
        setpoint, t = law.setpoint, loop.sense.layer
        if isinstance(law, Preview):
            law = edited(law, targets=ahead(law.targets, t))
        name = "level" if isinstance(setpoint, Level) else "levels"
        # the product of the fit, in its dtype, so that the numbers are the same
        levels = getattr(setpoint, name).new_tensor(mu[t]) * getattr(setpoint, name).new_tensor(new)
        if start is not None:
            levels = levels + levels.new_tensor(start[t])
        return edited(law, setpoint=edited(setpoint, **{name: levels}))

    draft.laws(change)
    if own:
        draft.loops = [loop.replace(law=Relative(cast(Relative, loop.law).law, not any(new))) for loop in draft.loops]


def planes(difference: Tensor, v: Tensor) -> Tensor:
    """For each layer a plane: the direction, and the first principal component of the layers' differences.

    `[layer+1 d] -> [layer+1 2 d]`; zeros where there is no direction. The component's sign, which the decomposition
    leaves open, is that of its largest entry.
    """
    rows = difference.double()
    component = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[0]
    component = component * component[component.abs().argmax()].sign()
    v = v.double()
    second = component - (v @ component)[:, None] * v
    second = second / second.norm(dim=-1, keepdim=True) * v.any(dim=-1, keepdim=True)
    return torch.stack([v, second], 1).to(difference)
