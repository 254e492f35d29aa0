"""One forward pass under control: the only place where masks, strength, dtype, adding and recording happen."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Ordered
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from steerlens.core.aside import Aside
from steerlens.core.law import Loop, Memory
from steerlens.core.prompt import Gate
from steerlens.core.record import Record
from steerlens.core.sequence import Sequence
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

    def __init__(self, loops: Ordered[Loop], *, record: Any = "scalars", run: str = ""):
        self.loops = list(loops)
        self.record = record
        self.names: dict[Site, SiteSignals] = name_signals(self.loops, run)
        self.log = Record()
        #: Prompt lengths of the passes inside `scoring`, with the thread that said so.
        self.scored: list[tuple[int, Any]] = []
        self.tap: Tap | None = None
        self.aside = Aside(self.loops)
        # what would be asked anew at every site and token
        self._stops, self._wheres = stops_of(self.loops, self.names, self.aside.watched)
        # of the present pass
        self.sequence = Sequence()
        self.positions = self.sequence.positions
        self._reached = _OUTSIDE
        self._observed = False
        self._selection: list[tuple[Any, bool]] = []
        self._states: dict[Site, Tensor] = {}
        self._memory: dict[int, Memory] = {}
        self._pieces: dict[str, list[Any]] = {}
        self._age = 0

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
        device: Any = None,
        sequence: Sequence | None = None,
        end: int | None = None,
        companion: Any = None,
        alone: bool = True,
        shown: bool = True,
    ) -> None:
        """Enter a forward pass; `shape`, `past`, `mask`, `device` and `end` as in `Positions.begin`.

        Args:
            sequence: The one that this pass belongs to; None: one of its own.
            companion: Makes what runs the model beside this pass, unsteered, from what the sequence keeps for it, see
                `Companion`; None if the host cannot.
            alone: No other run steers the model meanwhile.
            shown: `log` becomes the record of this sequence.
        """
        self.sequence = sequence = Sequence() if sequence is None else sequence
        self.positions = sequence.positions
        lengths = self._lengths() if self.scored and end is None else None
        sequence.begin(shape, past, mask, device=device, end=end, lengths=lengths)
        if shown:
            self.log.show(sequence.store)
        self._pieces, self._age = sequence.store["pieces"], len(sequence.store["moves"])
        for loop in self.loops:
            sequence.memory.setdefault(loop.group, {})
        self._observed = observed = self.record is not None or self.tap is not None
        self._memory = {group: {"sequence": kept, "observed": observed} for group, kept in sequence.memory.items()}
        selections = [self.positions.select(where) for where in self._wheres]
        self._selection = [(selection, _whole(selection, shape[1])) for selection in selections]
        self._states = {}
        self._reached = (-1, -1)
        self.aside.begin(sequence, companion, alone)

    def hold(self) -> dict[str, Any]:
        """All that belongs to the present pass, for `resume` after another one in its midst."""
        return {name: self.__dict__[name] for name in _OF_PASS}

    def resume(self, held: dict[str, Any]) -> None:
        """Go on with a pass."""
        self.__dict__.update(held)
        self.aside.sequence = self.sequence

    def rest(self) -> Any:
        """Leave every state alone until `wake` is given what this returns."""
        held, self._stops = self._stops, {}
        return held

    def wake(self, held: Any) -> None:
        """Act again."""
        self._stops = held

    def score(self, lengths: Any) -> None:
        """From now on, in this thread, prompts have these lengths; None ends it."""
        here = get_ident()
        if lengths is not None:
            self.scored = [*self.scored, (here, lengths)]
            return
        last = max(index for index, (thread, _) in enumerate(self.scored) if thread == here)
        self.scored = [entry for index, entry in enumerate(self.scored) if index != last]

    def _lengths(self) -> Any:
        here = get_ident()
        return next((lengths for thread, lengths in reversed(self.scored) if thread in (here, 0)), None)

    def __getstate__(self) -> dict[str, Any]:
        # where it is sent there is one thread, and another one
        lengths = self._lengths() if self.scored else None
        return self.__dict__ | {"scored": [] if lengths is None else [(0, lengths)]}

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
            self.aside.see(site, x)
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
        held = self.sequence.decisions.get(key)
        if held is None:
            # what is known of the prompt goes by the summaries of the gate itself, not by those of its copy
            pooled = [self.aside.summary(summary).to(x.device, wide_of(x)) for summary in gate.summaries]
            held = self.sequence.decisions[key] = fitted.to(x).decide(pooled)
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
            self._pieces.setdefault(name, []).append((self.positions.past, self._age, value.detach()))
        return value


#: Behind every site: what `at` compares with where no pass has begun.
_OUTSIDE = (1 << 60, 0)
#: Attributes of a `Pass` that belong to one forward pass.
_OF_PASS = ("sequence", "positions", "_reached", "_observed", "_selection", "_states", "_memory", "_pieces", "_age")


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
