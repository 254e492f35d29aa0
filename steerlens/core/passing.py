"""One forward pass under control: the only place where masks, strength, dtype, adding and recording happen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from steerlens.core.aside import Aside
from steerlens.core.law import Loop, Memory, Part, map_tensors
from steerlens.core.positions import Positions
from steerlens.core.prompt import Gate
from steerlens.core.record import Record
from steerlens.core.signals import SiteSignals, name_signals
from steerlens.core.sites import Site

Tap = Callable[[str, Tensor], Tensor]


class Pass:
    """Runs loops over the forward passes of a model, one after another.

    A host calls `begin` when a pass enters the model and `at` at every site in `sites`, in the order of the forward
    pass; nothing here knows the host.

    Args:
        loops: In the order in which they are composed; loops at one site act one after the other, and a loop that
            senses where it acts sees what the loops before it added.
        record: What `log` keeps: None (nothing, and nothing is computed for it), `"scalars"` (signals of one number
            per token), `"all"`, or names of signals.
        run: Put into the signals' names, to keep two controllers attached at once apart.
    """

    def __init__(self, loops: Sequence[Loop], *, record: Any = "scalars", run: str = ""):
        self.loops = list(loops)
        self.record = record
        self.names: dict[Site, SiteSignals] = name_signals(self.loops, run)
        self.positions = Positions()
        self.log = Record()
        self.tap: Tap | None = None
        self._reached: tuple[int, int] = (-1, -1)
        self._acting = {
            site: [index for index, loop in enumerate(self.loops) if loop.act == site] for site in self.names
        }
        self._sensed_later = {loop.sense for loop in self.loops if loop.sense != loop.act}
        self._spent = _last_uses(self.loops)
        # what would be asked anew at every site and token
        self._here = [loop.sense == loop.act for loop in self.loops]
        self._where: list[Any] = []
        self._which = [_index(self._where, loop.where) for loop in self.loops]
        self._selection: list[Any] = []
        self._states: dict[Site, Tensor] = {}
        self._memory: dict[int, Memory] = {}
        self._sequence: dict[int, Memory] = {}
        self._cast: dict[Any, tuple[Any, Any, Any]] = {}  # device, dtype, part
        self.aside = Aside(self.loops)

    @property
    def sites(self) -> list[Site]:
        """Where the host must call `at`, in the order of the forward pass."""
        return sorted({*self._acting, *self._sensed_later, *self.aside.watched})

    def begin(
        self,
        shape: tuple[int, int],
        *,
        past: int = 0,
        mask: Tensor | None = None,
        continues: bool = False,
        device: Any = None,
        companion: Any = None,
        alone: bool = True,
    ) -> None:
        """Enter a forward pass; arguments as in `Positions.begin`.

        Args:
            companion: Runs the model beside this pass, unsteered, see `Companion`; None where the host cannot.
            alone: No other run steers the model meanwhile.
        """
        fresh = self.positions.begin(shape, past, mask, continues=continues, device=device)
        if fresh:
            self._sequence = {loop.group: {} for loop in self.loops}
        if self.record is not None:
            self.log.begin(fresh=fresh, column=past)
        observed = self.record is not None or self.tap is not None
        self._memory = {group: {"sequence": kept, "observed": observed} for group, kept in self._sequence.items()}
        self._selection = [self.positions.select(where) for where in self._where]
        self._states = {}
        self._reached = (-1, -1)
        self.aside.begin(self.positions, fresh, companion, alone)

    def at(self, site: Site, x: Tensor, carrier: Tensor | None = None) -> Tensor:
        """Sense and act at a site.

        Args:
            x: The state there, `[batch pos ...]`.
            carrier: The tensor to which the control is added where that is not `x` itself.

        Returns:
            `carrier + u`, in its dtype; the same object where nothing acts.

        Raises:
            RuntimeError: a site comes twice in one pass. What is known of its tokens would be wrong.
        """
        if site.order <= self._reached:
            raise RuntimeError(
                f"{site} was run outside a forward pass of the model while it is steered; linearise or call single "
                "blocks before steering"
            )
        self._reached = site.order
        carrier = x if carrier is None else carrier
        if site in self._sensed_later:
            self._states[site] = x
        if site in self.aside.watched:
            self.aside.see(site, x, self.positions)
        acting = self._acting.get(site)
        if not acting:
            return carrier
        names = self.names[site]
        observed = self.record is not None or self.tap is not None
        total, squares = None, None
        for index, own in zip(acting, names.own, strict=True):
            loop = self.loops[index]
            selection = self._selection[self._which[index]]
            if not observed and (selection is None or loop.strength == 0):
                continue
            state = x if self._here[index] else self._states[loop.sense]
            u, signals = self._control(index, state, selection, carrier)
            if u.dtype != carrier.dtype or u.device != carrier.device:
                u = u.to(dtype=carrier.dtype, device=carrier.device)
            if observed:
                u = self._publish(own, u, signals)
                squares = _add(squares, signals["error"].square() if "error" in signals else None)
            total = _add(total, u)
            x = x + u if len(acting) > 1 else x
        if observed and names.total and total is not None:
            total = self._publish(names.total, total, {} if squares is None else {"error": squares.sqrt()})
        for sensed in self._spent.get(site, ()):  # a long prompt's states at all layers would fill a GPU
            self._states.pop(sensed, None)
        return carrier if total is None else carrier + total

    def _control(self, index: int, state: Tensor, selection: Any, carrier: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The control in full shape, zero at unselected tokens, and the signals, NaN there."""
        loop, shape = self.loops[index], state.shape[:2]
        if selection is None:
            blank = torch.full(shape, torch.nan, device=state.device)
            return torch.zeros_like(carrier), dict.fromkeys(loop.signals, blank)
        whole = not isinstance(selection, slice) or selection.stop - selection.start == shape[1]
        seen = state if whole else state[:, selection]
        dtype = _wide(seen)
        exact = seen if seen.dtype == dtype else seen.to(dtype)
        memory = self._memory[loop.group]
        if loop.summary is not None:
            memory["summary"] = self.aside.summary(loop.summary).to(seen.device, dtype)
        if loop.tangent is not None:
            tangent = self.aside.tangent(index, loop.act)
            memory["tangent"] = (tangent if whole else tangent[:, selection]).to(dtype)
        law, device = self._part(index, loop.law, seen), seen.device.type
        # NDIF runs every request to a half-precision GPU model under autocast
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                u, signals = law.act(exact, memory)
        else:
            u, signals = law.act(exact, memory)
        if loop.strength != 1:
            u = u * loop.strength if loop.strength else torch.zeros_like(u)
        for number, schedule in enumerate(loop.schedules):
            factors = self._part((index, "schedule", number), schedule, seen).at(self.positions.steps())
            u = u * _over(factors if whole else factors[:, selection], u)
        for number, gate in enumerate(loop.gates):
            decided, said = self._decision((index, "gate", number), gate, seen)
            u = u * _over(decided[:, None], u)
            before = signals.get("gate", torch.ones(u.shape[:2], dtype=u.dtype, device=u.device))
            signals = {**signals, **said, "gate": decided[:, None] * before}
        if u.shape[1] != shape[1] or not isinstance(selection, slice):
            u = _spread(u, selection, shape, 0.0)
        if not memory["observed"]:
            return u, {}
        return u, {name: _spread(value, selection, shape, torch.nan) for name, value in signals.items()}

    def _decision(self, key: Any, gate: Gate, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """A gate's decision, `[batch]`, and its signals, `[batch pos]`; made once for a prompt."""
        held = self.aside.decisions.get(key)
        if held is None:
            dtype = _wide(x)
            pooled = [self.aside.summary(summary).to(x.device, dtype) for summary in gate.summaries]
            held = self.aside.decisions[key] = self._part(key, gate, x).decide(pooled)
        decided, said = held
        return decided.to(x.device), {name: value[:, None].expand(-1, x.shape[1]) for name, value in said.items()}

    def _part(self, key: Any, part: Part, x: Tensor) -> Any:
        """A part of a loop on the state's device, in the dtype laws compute in."""
        dtype = _wide(x)
        device, kind, cast = self._cast.get(key, (None, None, None))
        if device != x.device or kind is not dtype:
            # inside generate() of HookedTransformer an ordinary .to() would leave inference tensors behind, which a
            # later forward pass with gradients could not use
            with torch.inference_mode(False):
                cast = map_tensors(part, lambda t: t.to(x.device, dtype if t.is_floating_point() else t.dtype))
            self._cast[key] = x.device, dtype, cast
        return cast

    def _publish(self, names: dict[str, str], u: Tensor, signals: dict[str, Tensor]) -> Tensor:
        """Show the signals to the host's hook points, which may change `u`, and log them."""
        u = self._emit("u", names["u"], u)
        norm = torch.linalg.vector_norm(u.flatten(2), dim=-1, dtype=torch.promote_types(u.dtype, torch.float32))
        self._emit("u_norm", names["u_norm"], norm)
        for signal, value in signals.items():
            if signal in names:
                self._emit(signal, names[signal], value)
        return u

    def _emit(self, signal: str, name: str, value: Tensor) -> Tensor:
        if self.tap is not None:
            value = self.tap(name, value)
        if self.record is not None and _keeps(self.record, signal, value):
            self.log.put(name, value)
        return value


def _wide(x: Tensor) -> torch.dtype:
    """The dtype in which laws and conditions see a state."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _last_uses(loops: Sequence[Loop]) -> dict[Site, list[Site]]:
    """By acting site, the sensed sites whose states no later loop needs."""
    last: dict[Site, Site] = {}
    for loop in loops:
        if loop.sense != loop.act:
            last[loop.sense] = max(loop.act, last.get(loop.sense, loop.act))
    return {act: [sensed for sensed in last if last[sensed] == act] for act in set(last.values())}


def _keeps(record: Any, signal: str, value: Tensor) -> bool:
    if record == "all":
        return True
    return value.ndim == 2 if record == "scalars" else signal in record


def _spread(value: Tensor, selection: Any, shape: Any, blank: float) -> Tensor:
    """A value at the selected tokens, in the shape of all tokens."""
    if isinstance(selection, slice):
        if value.shape[1] == shape[1]:
            return value
        full = value.new_full((*shape, *value.shape[2:]), blank)
        full[:, selection] = value
        return full
    return torch.where(selection.view(*shape, *[1] * (value.ndim - 2)), value, blank)


def _over(factors: Tensor, u: Tensor) -> Tensor:
    """`[batch pos]` in a shape that multiplies `[batch pos ...]`."""
    return factors.view(*factors.shape, *[1] * (u.ndim - 2))


def _add(total: Tensor | None, value: Tensor | None) -> Tensor | None:
    if total is None or value is None:
        return value if total is None else total
    return total + value


def _index(wheres: list[Any], where: Any) -> int:
    """Index of an equal entry, appended where there is none; masks and callables are equal only to themselves."""
    for index, other in enumerate(wheres):
        if where is other or (isinstance(where, (str, slice)) and type(where) is type(other) and where == other):
            return index
    wheres.append(where)
    return len(wheres) - 1
