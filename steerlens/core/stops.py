"""What a pass does at each of its sites, worked out before the first token, since every token passes every site."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steerlens.core.law import Loop
from steerlens.core.part import Part, map_tensors
from steerlens.core.signals import SiteSignals
from steerlens.core.sites import Site
from steerlens.core.span import Span
from steerlens.core.types import RecordSpec, Where

#: A signal: name, hook name, and whether the record keeps it.
Shown = tuple[str, str, bool]


class Placed:
    """A part of a loop, kept in the dtype that laws compute in and on the device of the state it last met.

    Args:
        part: As it is in the controller.

    Attributes:
        copy: The part for such a state; `dtype` and `device` are those of the state.
        wide: The dtype to compute in; `kind` is the kind of device.
    """

    __slots__ = ("copy", "device", "dtype", "kind", "part", "wide")

    def __init__(self, part: Part):
        self.part = part
        self.wide = torch.float32
        self.kind = "cpu"
        self.copy: Any = part
        self.device: Any = None
        self.dtype: Any = None

    def to(self, x: Tensor) -> Any:
        """The part for a state."""
        if x.dtype is not self.dtype or x.device != self.device:
            self.wide = wide = wide_of(x)
            # inside generate() of HookedTransformer an ordinary .to() would leave inference tensors behind, which a
            # later forward pass with gradients could not use
            with torch.inference_mode(False):
                self.copy = map_tensors(self.part, lambda t: t.to(x.device, wide if t.is_floating_point() else t.dtype))
            self.device, self.dtype, self.kind = x.device, x.dtype, x.device.type
        return self.copy


def wide_of(x: Tensor) -> torch.dtype:
    """The dtype in which laws and conditions see a state."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Action:
    """One loop, at the site where it acts.

    Attributes:
        index: Of the loop, in the pass.
        sense: Order of the site whose state it needs, None for the one where it acts.
        where: Index of its token positions among those of the pass.
        plain: A law and a factor, nothing else.
        shown: Its signals: name, hook name, and whether the record keeps it.
    """

    __slots__ = ("gates", "index", "law", "loop", "plain", "schedules", "sense", "shown", "strength", "where")

    def __init__(self, index: int, loop: Loop, where: int, shown: list[Shown]):
        self.index = index
        self.loop = loop
        self.strength = loop.factor
        self.sense = None if loop.sense == loop.act else loop.sense.order
        self.where = where
        self.plain = not (loop.gates or loop.schedules or loop.summary or loop.tangent or loop.reference)
        self.shown = shown
        self.law = Placed(loop.law)
        self.gates = [(gate, Placed(gate), table) for gate, table in zip(loop.gates, loop.measured, strict=True)]
        self.schedules = [Placed(schedule) for schedule in loop.schedules]


class Stop:
    """A site of a pass.

    Attributes:
        site: Where it is.
        order: Of the site, see `Site`.
        kept: A later loop needs the state that is here.
        branch: It is what a branch puts out, to which some blocks add in place.
        summarised: A summary of the prompt is made of the state that is here.
        actions: Loops that act here, in their order.
        shown: Signals of all of them together, as in `Action`; see `SiteSignals`.
        spent: Orders of sites whose states no loop after this site needs.
    """

    __slots__ = ("actions", "branch", "kept", "order", "shown", "site", "spent", "summarised")

    def __init__(self, site: Site, *, kept: bool, summarised: bool, actions: list[Action], shown: list[Shown]):
        self.site = site
        self.order = site.order
        self.kept = kept
        self.branch = site.point in ("attn_out", "mlp_out")
        self.summarised = summarised
        self.actions = actions
        self.shown = shown
        self.spent: list[tuple[int, int]] = []


def stops_of(
    loops: Sequence[Loop], names: dict[Site, SiteSignals], summarised: set[Site], record: RecordSpec
) -> tuple[dict[tuple[int, int], Stop], list[Any]]:
    """What to do at each site, by its order in the forward pass, and the token positions that its actions name.

    By order and not by site: a dictionary would call a site's `__hash__`, five times a layer and token.
    """
    wheres: list[Any] = []
    sensed = {site for loop in loops for site in loop.sensed}
    stops = {}
    for site in sorted({*names, *sensed, *summarised}):
        signals = names.get(site)
        own = iter(() if signals is None else signals.own)
        actions = [
            Action(index, loop, _index(wheres, loop.where), _shown(next(own), record, loop.law.vectors))
            for index, loop in enumerate(loops)
            if loop.act == site
        ]
        shown = [] if signals is None else _shown(signals.total, record, ())
        stops[site.order] = Stop(site, kept=site in sensed, summarised=site in summarised, actions=actions, shown=shown)
    for site in sensed:
        # a long prompt's states at all layers would fill a GPU
        stops[max(loop.act.order for loop in loops if site in loop.sensed)].spent.append(site.order)
    return stops, wheres


def wheres_of(loops: Sequence[Loop]) -> dict[int, list[Any]]:
    """By group of loops, the token positions that they name."""
    found: dict[int, list[Any]] = {}
    for loop in loops:
        _index(found.setdefault(loop.group, []), loop.where)
    return found


def _shown(names: dict[str, str], record: RecordSpec, vectors: Sequence[str]) -> list[Shown]:
    """Signals of one loop, or of all at a site; `names`: by signal, as in `SiteSignals`."""
    if record in (None, "all"):
        kept = set(names) if record else set()
    elif record == "scalars":
        kept = {name for name in names if name != "u" and name not in vectors}
    else:
        kept = set(record)
    return [(signal, name, signal in kept) for signal, name in names.items()]


def _index(wheres: list[Any], where: Where) -> int:
    """Index of an equal entry, appended where there is none; masks and callables are equal only to themselves."""
    for index, other in enumerate(wheres):
        if where is other or (isinstance(where, (str, slice)) and type(where) is type(other) and where == other):
            return index
        if isinstance(where, Span) and isinstance(other, Span) and where.same(other):
            return index
    wheres.append(where)
    return len(wheres) - 1
