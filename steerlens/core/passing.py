"""One forward pass under control: the only place where masks, strength, dtype, adding and recording happen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from steerlens.core.aside import Aside
from steerlens.core.law import Loop, Memory
from steerlens.core.positions import Positions
from steerlens.core.prompt import Gate
from steerlens.core.record import Record
from steerlens.core.signals import SiteSignals, name_signals
from steerlens.core.sites import Site
from steerlens.core.stops import Fitted, Turn, stops_of, wide_of

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
        self.aside = Aside(self.loops)
        # what would be asked anew at every site and token
        self._stops, self._wheres = stops_of(self.loops, self.names, self.aside.watched)
        self._reached: tuple[int, int] = (-1, -1)
        self._observed = False
        self._selection: list[tuple[Any, bool]] = []
        self._states: dict[Site, Tensor] = {}
        self._memory: dict[int, Memory] = {}
        self._sequence: dict[int, Memory] = {}

    @property
    def sites(self) -> list[Site]:
        """Where the host must call `at`, in the order of the forward pass."""
        return list(self._stops)

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
        self._observed = observed = self.record is not None or self.tap is not None
        self._memory = {group: {"sequence": kept, "observed": observed} for group, kept in self._sequence.items()}
        selections = [self.positions.select(where) for where in self._wheres]
        self._selection = [(selection, _whole(selection, shape[1])) for selection in selections]
        self._states = {}
        self._reached = (-1, -1)
        self.aside.begin(self.positions, fresh, companion, alone)

    def at(self, site: Site, x: Tensor, carrier: Tensor | None = None) -> Tensor:
        """Sense and act at a site.

        Args:
            x: The state there, `[batch pos ...]`.
            carrier: The tensor to which the control is added where that is not `x` itself.

        Returns:
            `carrier + u`, in its dtype; the same object where nothing acts, as at sites not in `sites`.

        Raises:
            RuntimeError: a site comes twice in one pass. What is known of its tokens would be wrong.
        """
        stop = self._stops.get(site)
        if carrier is None:
            carrier = x
        if stop is None:
            return carrier
        if stop.order <= self._reached:
            raise RuntimeError(
                f"{site} was run outside a forward pass of the model while it is steered; linearise or call single "
                "blocks before steering"
            )
        self._reached = stop.order
        if stop.kept:
            self._states[site] = x
        if stop.watched:
            self.aside.see(site, x, self.positions)
        if not stop.turns:
            return carrier
        observed = self._observed
        total, squares = None, None
        for turn in stop.turns:
            selection, whole = self._selection[turn.where]
            if not observed and (selection is None or turn.strength == 0):
                continue
            state = x if turn.sense is None else self._states[turn.sense]
            if whole and turn.plain:
                u, signals = self._law(turn, state)
            else:
                u, signals = self._control(turn, state, selection, whole, carrier)
            if u.dtype != carrier.dtype or u.device != carrier.device:
                u = u.to(dtype=carrier.dtype, device=carrier.device)
            if observed:
                u = self._publish(turn.names, u, signals)
                if stop.total and "error" in signals:
                    square = signals["error"].square()
                    squares = square if squares is None else squares + square
            total = u if total is None else total + u
            if len(stop.turns) > 1:
                x = x + u
        if observed and stop.total and total is not None:
            total = self._publish(stop.total, total, {} if squares is None else {"error": squares.sqrt()})
        for sensed in stop.spent:
            self._states.pop(sensed, None)
        return carrier if total is None else carrier + total

    def _law(self, turn: Turn, seen: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What the law says of a state, and the loop's strength makes of it."""
        law, memory = turn.law.to(seen), self._memory[turn.loop.group]
        exact = seen if seen.dtype is turn.law.wide else seen.to(turn.law.wide)
        # NDIF runs every request to a half-precision GPU model under autocast
        if torch.is_autocast_enabled(turn.law.kind):
            with torch.autocast(turn.law.kind, enabled=False):
                u, signals = law.act(exact, memory)
        else:
            u, signals = law.act(exact, memory)
        if turn.strength != 1:
            u = u * turn.strength if turn.strength else torch.zeros_like(u)
        return u, signals

    def _control(
        self, turn: Turn, state: Tensor, selection: Any, whole: bool, carrier: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The control in full shape, zero at unselected tokens, and the signals, NaN there."""
        loop, shape = turn.loop, state.shape[:2]
        if selection is None:
            blank = torch.full(shape, torch.nan, device=state.device)
            return torch.zeros_like(carrier), dict.fromkeys(loop.signals, blank)
        part = slice(None) if isinstance(selection, Tensor) or whole else selection
        seen = state[:, part]
        memory = self._memory[loop.group]
        if loop.summary is not None:
            memory["summary"] = self.aside.summary(loop.summary).to(seen.device, wide_of(seen))
        if loop.tangent is not None:
            memory["tangent"] = self.aside.tangent(turn.index, loop.act)[:, part].to(wide_of(seen))
        u, signals = self._law(turn, seen)
        for schedule in turn.schedules:
            u = u * _over(schedule.to(seen).at(self.positions.steps())[:, part], u)
        for number, (gate, fitted, table) in enumerate(turn.gates):
            decided, measured = self._decision((turn.index, number), gate, fitted, seen)
            said = {name: measured[own] for own, name in table.items()}
            u = u * _over(decided[:, None], u)
            before = signals.get("gate", torch.ones(u.shape[:2], dtype=u.dtype, device=u.device))
            signals = {**signals, **said, "gate": decided[:, None] * before}
        if not whole:
            u = _spread(u, selection, shape, 0.0)
        if not whole and self._observed:
            signals = {name: _spread(value, selection, shape, torch.nan) for name, value in signals.items()}
        return u, signals

    def _decision(self, key: Any, gate: Gate, fitted: Fitted, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """A gate's decision, `[batch]`, and its signals, `[batch pos]`; made once for a prompt."""
        held = self.aside.decisions.get(key)
        if held is None:
            # what is known of the prompt goes by the summaries of the gate itself, not by those of its copy
            pooled = [self.aside.summary(summary).to(x.device, wide_of(x)) for summary in gate.summaries]
            held = self.aside.decisions[key] = fitted.to(x).decide(pooled)
        decided, said = held
        return decided.to(x.device), {name: value[:, None].expand(-1, x.shape[1]) for name, value in said.items()}

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


def _whole(selection: Any, length: int) -> bool:
    """Whether all tokens of a pass are selected, as far as that can be told without looking at tensors."""
    return isinstance(selection, slice) and selection.stop - selection.start == length


def _keeps(record: Any, signal: str, value: Tensor) -> bool:
    if record == "all":
        return True
    return value.ndim == 2 if record == "scalars" else signal in record


def _spread(value: Tensor, selection: Any, shape: Any, blank: float) -> Tensor:
    """A value at the selected tokens, in the shape of all tokens."""
    if isinstance(selection, slice):
        full = value.new_full((*shape, *value.shape[2:]), blank)
        full[:, selection] = value
        return full
    return torch.where(selection.view(*shape, *[1] * (value.ndim - 2)), value, blank)


def _over(factors: Tensor, u: Tensor) -> Tensor:
    """`[batch pos]` in a shape that multiplies `[batch pos ...]`."""
    return factors.view(*factors.shape, *[1] * (u.ndim - 2))
