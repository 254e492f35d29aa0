"""Directions and the levels at which they are held, from contrast texts or from directions of the user's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from steerlens.core import Law, Loop, Site
from steerlens.core.types import Json
from steerlens.fit.contrast import Pairs, Text, tokenize
from steerlens.fit.logistic import linear_probe
from steerlens.fit.reading import check_finite, contrast_states, numbers
from steerlens.fit.retune import Draft, edited
from steerlens.hosts import Host

#: On which side of the level a state may be.
Bound: TypeAlias = Literal["at_least", "at_most", "at"]

#: What a level is counted in.
Unit: TypeAlias = Literal["separation", "activation", "quantile", "logit"]

#: In units of the class separation, from the negative texts' mean. Measured: `docs/choose_method.md`.
LEVEL = 1.5
#: Largest condition of several unit directions with which they count as independent in float32.
CONDITION = 1e4


def own_directions(data: Any) -> bool:
    """Whether data are directions of the user's: numbers, or a mapping from layers to them."""
    return isinstance(data, (Tensor, Mapping)) or (hasattr(data, "__array__") and not isinstance(data, Pairs))


@dataclass(frozen=True)
class Held:
    """What is held at one site.

    Attributes:
        directions: `[m d]`, rows of unit norm.
        levels: beta, `[m]`, in activation units.
        bounds: Lower and upper ends of the ranges, and where they begin to count, `[m]` each, as `Range` takes them.
        accuracy: Of the probe on the texts that it was fitted on, if there is one.
        affine: Factor and constant, `[m]` each, that make a level one in activation units; None for quantiles.
    """

    directions: Tensor
    levels: Tensor
    bounds: tuple[Tensor, Tensor, Tensor, Tensor]
    accuracy: float | None = None
    affine: tuple[Tensor, Tensor] | None = None


class Levels:
    """What the user asked for, checked before any forward pass; arguments as for `hold`.

    Raises:
        TypeError: directions that hold no numbers.
        ValueError: arguments that do not go together.
    """

    def __init__(
        self,
        data: Any,
        level: float | Sequence[float] | None,
        *,
        unit: Unit | None,
        side: Bound,
        trigger: float | Sequence[float] | None,
        origin: str | None,
        direction: str,
        texts: Sequence[Text] | None,
    ):
        self.rows = _rows(data) if own_directions(data) else None
        self.concepts: list[Pairs] = [] if self.rows is not None else [data] if isinstance(data, Pairs) else list(data)
        self.unit = unit or ("separation" if self.rows is None else "activation")
        self.side, self.direction, self.texts = side, direction, texts
        self.count = len(self.concepts) if self.rows is None else len(next(iter(self.rows.values())))
        self._check(direction, origin)
        if level is None:
            level = {"separation": LEVEL, "logit": 0.0}.get(self.unit)
            if level is None:
                raise ValueError(f"unit={self.unit!r} has no default level; give level=")
        self.origin = origin or {"separation": "negative", "activation": "zero"}.get(self.unit, "none")
        self.levels = self._numbers("level", level)
        self.triggers = self.levels if trigger is None else self._numbers("trigger", trigger)
        if side == "at" and trigger is not None:
            raise ValueError("side='at' moves every token; a trigger is for 'at_least' and 'at_most'")
        for one, other in zip(self.levels, self.triggers, strict=True):
            if (side == "at_least" and other > one) or (side == "at_most" and other < one):
                beyond = "above" if side == "at_least" else "below"
                raise ValueError(
                    f"trigger={other:g} is {beyond} the level {one:g}; side={side!r} acts on the other side"
                )

    @property
    def own(self) -> bool:
        """Levels are counted from the token's own unsteered state."""
        return self.origin == "own"

    @property
    def layers(self) -> list[int] | None:
        """The layers that the user gave directions for."""
        return [layer for layer in self.rows if layer is not None] or None if self.rows is not None else None

    def at(self, host: Host, sites: Sequence[Site]) -> dict[Site, Held]:
        """Directions and levels at each site.

        Raises:
            ValueError: sides with identical activations, dependent directions, a width or layer that does not fit.
        """
        states = [contrast_states(host, pairs, sites) for pairs in self.concepts]
        read = self._texts(host, sites) if self.unit == "quantile" else {}
        return {site: self._held(host, site, [each[site] for each in states], read.get(site)) for site in sites}

    def found(self, held: Mapping[Site, Held]) -> dict[str, Any]:
        """For the recipe: how well the probes classify their texts, and what other levels need, see `retune_held`."""
        scores = [at.accuracy for at in held.values() if at.accuracy is not None]
        affine = {str(site): [part.tolist() for part in at.affine] for site, at in held.items() if at.affine}
        return ({"accuracy": scores} if scores else {}) | ({"affine": affine} if affine else {})

    def _held(self, host: Host, site: Site, states: list[tuple[Tensor, Tensor]], read: Tensor | None) -> Held:
        accuracy: float | None = None
        if self.rows is not None:
            v = self._given(host, site)
            scale, start = torch.ones(len(v)).double(), torch.zeros(len(v)).double()
        else:
            v, scale, start, accuracy = self._fitted(site, states)
        if len(v) > 1 and not float(torch.linalg.cond(v)) <= CONDITION:
            raise ValueError(f"the directions at {site} are linearly dependent; give fewer")
        levels, triggers = (self._place(values, v, scale, start, read) for values in (self.levels, self.triggers))
        like = states[0][0] if states else torch.empty(0, dtype=torch.promote_types(host.dtype, torch.float32))
        lower, upper, below, above = (bound.to(like.dtype) for bound in _bounds(levels, triggers, self.side))
        affine = None if self.unit == "quantile" else (scale, start)
        return Held(v.to(like.dtype), levels, (lower, upper, below, above), accuracy, affine)

    def _place(self, values: list[float], v: Tensor, scale: Tensor, start: Tensor, read: Tensor | None) -> Tensor:
        """Levels in activation units, `[m]`."""
        asked = torch.tensor(values, dtype=torch.float64)
        if self.unit == "quantile":
            assert read is not None
            p = read.double() @ v.T
            return torch.stack([torch.quantile(p[:, i], q) for i, q in enumerate(asked)])
        return asked * scale + start

    def _given(self, host: Host, site: Site) -> Tensor:
        assert self.rows is not None
        found = self.rows.get(site.layer, self.rows.get(None))
        if found is None:
            raise ValueError(f"no direction for layer {site.layer}; the mapping has {self.layers}")
        width = host.shape(site)[0]
        if found.shape[-1] != width:
            raise ValueError(f"a direction has {found.shape[-1]} numbers; the state at {site} has {width}")
        return found

    def _fitted(self, site: Site, states: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor, float | None]:
        """Unit directions, and the factor and constant that make a level one in activation units."""
        rows, scales, starts, scores = [], [], [], []
        for positive, negative in states:
            positive, negative = positive.double(), negative.double()
            difference = positive.mean(0) - negative.mean(0)
            bias = torch.zeros(()).double()
            if not difference.any():
                raise ValueError(
                    f"both sides have identical activations at {site}; do all texts end in the same token?"
                )
            if self.direction == "probe":
                x = torch.cat([positive, negative])
                labels = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))])
                difference, bias = linear_probe(x, labels)
                right = ((x @ difference + bias > 0).double() == labels).double()
                scores.append(float(right.mean()))
            length = difference.norm()
            v = difference / length
            ends = positive.mean(0) @ v, negative.mean(0) @ v
            origins = {"negative": ends[1], "midpoint": (ends[0] + ends[1]) / 2}
            rows.append(v)
            if self.unit == "logit":
                scales.append(1 / length)
                starts.append(-bias / length)
                continue
            scales.append(ends[0] - ends[1] if self.unit == "separation" else torch.ones(()).double())
            starts.append(origins.get(self.origin, torch.zeros(()).double()))
        return torch.stack(rows), torch.stack(scales), torch.stack(starts), min(scores) if scores else None

    def _texts(self, host: Host, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """States of all tokens but the first of each text, `[token d]`."""
        texts = self.texts or [text for pairs in self.concepts for text in (*pairs.positive, *pairs.negative)]
        bos = self.concepts[0].prepend_bos if self.concepts and self.texts is None else None
        tokens = [ids for ids in (tokenize(text, host, bos)[0] for text in texts) if len(ids) > 1]
        if not tokens:
            raise ValueError("every text has one token, whose position 0 counts in no quantile; give longer texts")
        found = {}
        for site, each in host.states(tokens, sites).items():
            found[site] = torch.cat([x[1:] for x in each])
            check_finite(found[site], site, host)
        return found

    def _numbers(self, name: str, given: float | Sequence[float]) -> list[float]:
        values = numbers(name, given)
        each: list[float] = values if isinstance(values, list) else [values] * self.count
        if len(each) != self.count:
            raise ValueError(f"{name} has {len(each)} numbers for {self.count} directions")
        for value in each:
            if not math.isfinite(value):
                raise ValueError(f"{name}={value}; it must be finite")
            if self.unit == "quantile" and not 0 < value < 1:
                raise ValueError(f"{name}={value:g}; a quantile lies between 0 and 1")
        return each

    def _check(self, direction: str, origin: str | None) -> None:
        if self.rows is not None:
            if direction != "mean":
                raise ValueError("direction='probe' is fitted on contrast texts, and data are directions of your own")
            if self.unit in ("separation", "logit") or origin in ("negative", "midpoint"):
                asked = f"origin={origin!r}" if self.unit in ("activation", "quantile") else f"unit={self.unit!r}"
                raise ValueError(f"{asked} refers to contrast texts, and data are directions of your own")
            if self.unit == "quantile" and not self.texts:
                raise ValueError("unit='quantile' refers to texts; give texts=")
        if self.unit == "logit" and direction != "probe":
            raise ValueError("unit='logit' is that of a probe; give direction='probe'")
        if self.unit in ("quantile", "logit") and origin is not None:
            raise ValueError(f"origin={origin!r} is for separations and activations; unit={self.unit!r} has its own")
        if self.texts is not None and self.unit != "quantile":
            raise ValueError(f"texts= is for unit='quantile', not for {self.unit!r}")
        if isinstance(self.texts, (str, bytes)):
            raise TypeError("texts is a single string; give a list of texts")


def _rows(data: Any) -> dict[int | None, Tensor]:
    """Unit directions by layer, `[m d]`, float64; under None those for every layer."""
    given = dict(data) if isinstance(data, Mapping) else {None: data}
    if not given:
        raise ValueError("data is an empty mapping; give a direction for one layer or more")
    rows: dict[int | None, Tensor] = {}
    for layer, each in given.items():
        what = "data" if layer is None else f"data[{layer!r}]"
        if layer is not None:
            if isinstance(layer, bool) or not hasattr(layer, "__index__") or index(layer) < 0:
                raise ValueError(f"{what} is for no layer; the keys are layers, counted from 0")
            layer = index(layer)
        try:
            found = torch.as_tensor(each)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{what} is a {type(each).__name__} that holds no numbers; give a tensor [d]") from error
        if found.is_complex() or found.dtype == torch.bool:
            raise TypeError(f"{what} is a tensor of {found.dtype}; give real numbers")
        if found.ndim not in (1, 2) or not found.numel():
            raise ValueError(f"{what} has shape {list(found.shape)}; give a direction [d], or rows [m d]")
        found = found.detach().cpu().double().reshape(-1, found.shape[-1])
        lengths = found.norm(dim=-1, keepdim=True)
        if not bool(torch.isfinite(found).all()) or not bool((lengths > 0).all()):
            raise ValueError(f"{what} is zero or not finite; give a direction")
        rows[layer] = found / lengths
    counts = {len(each) for each in rows.values()}
    if len(counts) > 1:
        raise ValueError(f"data has {min(counts)} directions at one layer and {max(counts)} at another")
    return rows


def _bounds(levels: Tensor, triggers: Tensor, side: str) -> list[Tensor]:
    """Lower and upper ends of the ranges, and where they begin to count."""
    none = torch.full_like(levels, math.inf)
    at_least, at_most = side != "at_most", side != "at_least"
    return [
        levels if at_least else -none,
        levels if at_most else none,
        triggers if at_least else -none,
        triggers if at_most else none,
    ]


def tuned_levels(recipe: Json) -> list[str]:
    """What `retune_held` changes: a quantile needs the texts again."""
    return ["level", "trigger"] if "affine" in (recipe.get("found") or {}) else []


def retune_held(draft: Draft) -> None:
    """Another `level` or `trigger` for the loops of `hold`."""
    # the new values as they were given: in a recipe NaN is a text
    given = draft.arguments | dict(draft.changes)
    level, trigger, unit, side = (given[name] for name in ("level", "trigger", "unit", "side"))
    affine = {
        site: [torch.tensor(part, dtype=torch.float64) for part in each] for site, each in draft.found["affine"].items()
    }
    if level is None:
        level = 0.0 if unit == "logit" else LEVEL
    rows = torch.eye(len(next(iter(affine.values()))[0]))
    asked = Levels(
        rows, level, unit="activation", side=side, trigger=trigger, origin=None, direction="mean", texts=None
    )
    draft.found["levels"] = []
    bounds = {}
    for site, (scale, start) in affine.items():
        levels, triggers = (
            torch.tensor(v, dtype=torch.float64) * scale + start for v in (asked.levels, asked.triggers)
        )
        bounds[site] = _bounds(levels, triggers, side)
        draft.found["levels"].append(levels.tolist())

    def change(law: Any, loop: Loop) -> Law:
        lower, upper, below, above = (bound.to(law.setpoint.basis) for bound in bounds[str(loop.act)])
        return edited(law, setpoint=edited(law.setpoint, lower=lower, upper=upper, below=below, above=above))

    draft.laws(change)
