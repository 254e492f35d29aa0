"""One forward pass under control: the only place where masks, strength, dtype, adding and recording happen."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Ordered
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from steerlens.core.aside import Aside
from steerlens.core.law import Loop, Signals
from steerlens.core.memory import LOST, STEPWISE, Memory, apart
from steerlens.core.now import Now
from steerlens.core.prompt import Gate
from steerlens.core.record import Record
from steerlens.core.sequence import Sequence
from steerlens.core.signals import SiteSignals, gated, name_signals
from steerlens.core.sites import Site
from steerlens.core.span import Span
from steerlens.core.stops import Action, Placed, Shown, stops_of, wheres_of, wide_of
from steerlens.core.types import RecordSpec


class Display:
    """Abstract: where a host shows signals while a pass runs. A host makes it."""

    def looks(self, name: str) -> bool:
        """Whether anybody looks at the signal of this hook name; if nobody does, it need not be computed."""
        raise NotImplementedError

    def show(self, name: str, value: Tensor) -> Tensor:
        """Show a signal; returns it, or what somebody has put in its place."""
        raise NotImplementedError


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

    def __init__(self, loops: Ordered[Loop], *, record: RecordSpec = "scalars", run: str = ""):
        self.loops = list(loops)
        self.record = record
        self.names: dict[Site, SiteSignals] = name_signals(self.loops, run)
        self.log = Record()
        #: Prompt lengths of the passes inside `scoring`, with the thread that set them.
        self.scored: list[tuple[int, Any]] = []
        self.display: Display | None = None
        self.aside = Aside(self.loops)
        # what would be asked anew at every site and token
        self._stops, self._wheres = stops_of(self.loops, self.names, self.aside.summarised, record)
        self._groups = wheres_of(self.loops)
        asked = [*(loop.where for loop in self.loops), *(s.where for loop in self.loops for s in loop.summaries)]
        #: Whether it needs the ids of the tokens.
        self.reads_tokens = any(isinstance(where, Span) for where in asked)
        self._stepwise = any(loop.law.stepwise for loop in self.loops)
        # of the present pass
        self.sequence = Sequence()
        self.positions = self.sequence.positions
        self._reached = _OUTSIDE
        self._observed = False
        self._selection: list[tuple[Any, bool]] = []
        self._states: dict[tuple[int, int], Tensor] = {}
        self._now: dict[int, Now] = {}  # by group
        self._apart: set[int] = set()  # groups whose laws are called row by row
        self._pieces: dict[str, list[Any]] = {}
        self._age = 0

    @property
    def sites(self) -> list[Site]:
        """Where the host must call `at`, in the order of the forward pass."""
        return [stop.site for stop in self._stops.values()]

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
        tokens: Tensor | None = None,
    ) -> None:
        """Enter a forward pass; `shape`, `past`, `mask`, `device` and `end` as in `Positions.begin`.

        Args:
            sequence: The one that this pass belongs to; None: one of its own.
            companion: Makes what runs the model beside this pass, unsteered, from what the sequence keeps for it, see
                `Companion`; None if the host cannot.
            alone: No other run steers the model meanwhile.
            shown: `log` becomes the record of this sequence.
            tokens: As in `Positions.begin`.
        """
        self.sequence = sequence = Sequence() if sequence is None else sequence
        self.positions = sequence.positions
        lengths = self._lengths() if self.scored and end is None else None
        first, sequence.wheres = sequence.positions.seen == 0, self._groups
        sequence.begin(shape, past, mask, device=device, end=end, lengths=lengths, tokens=tokens)
        if shown:
            self.log.show(sequence.store)
        self._pieces, self._age = sequence.store["pieces"], len(sequence.store["moves"])
        if self._stepwise and end is not None and shape[1] > 1 and (end <= past or (first and end < past + shape[1])):
            raise RuntimeError(STEPWISE)
        for group in self._groups.keys() - sequence.memory.keys():
            sequence.memory[group] = Memory()
        self._observed = self.record is not None or self.display is not None
        self._now, self._selection, self._apart = {}, [], set()
        for group, kept in sequence.memory.items():
            if kept.lost:
                raise RuntimeError(LOST)
            if kept.rows is not None:
                self._apart.add(group)
                kept.layers = None
            self._now[group] = Now({}, kept.together)
        for where in self._wheres:
            selection = self.positions.select(where)
            self._selection.append((selection, _whole(selection, shape[1])))
        self._states = {}
        self._reached = (-1, -1)
        self.aside.begin(sequence, companion, alone, observed=self._observed)

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
            carrier: The tensor to which the control is added, if that is not `x` itself.

        Returns:
            `carrier + u`, in its dtype; the same object if nothing acts, as at sites that are not in `sites`.

        Raises:
            RuntimeError: a site comes twice in one pass. What is known of its tokens would be wrong.
        """
        stop = self._stops.get(site.order)
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
            self._states[stop.order] = x.clone() if stop.branch else x
        if stop.summarised:
            self.aside.see(site, x)
        if not stop.actions:
            return carrier
        observed = self._observed
        several = len(stop.actions) > 1
        # the total error is asked of each loop
        squared = (
            observed
            and several
            and any(signal == "error" and self._looks(name, kept) for signal, name, kept in stop.shown)
        )
        total, squares = None, None
        for action in stop.actions:
            selection, whole = self._selection[action.where]
            if not observed and (selection is None or action.strength == 0):
                continue
            state = x if action.sense is None else self._states[action.sense]
            if whole and action.plain and action.loop.group not in self._apart:
                u, signals = self._law(action, state, self._now[action.loop.group])
            else:
                u, signals = self._control(action, state, selection, whole, carrier, x)
            if u.dtype != carrier.dtype or u.device != carrier.device:
                u = u.to(dtype=carrier.dtype, device=carrier.device)
            if observed:
                u, error = self._publish(action.shown, u, signals, squared)
                if error is not None:
                    squares = error.square() if squares is None else squares + error.square()
            total = u if total is None else total + u
            if several:
                x = x + u
        if observed and several and total is not None:
            together = {} if squares is None else {"error": squares.sqrt}
            total, _ = self._publish(stop.shown, total, together)
        for sensed in stop.spent:
            self._states.pop(sensed, None)
        return carrier if total is None else carrier + total

    def _law(self, action: Action, seen: Tensor, now: Now) -> tuple[Tensor, Signals]:
        """The control that a law gives for a state, times the loop's strength."""
        placed = action.law
        # as `placed.to` does, without a call: every token comes by every loop
        known = seen.dtype is placed.dtype and seen.device == placed.device
        law = placed.copy if known else placed.to(seen)
        exact = seen if seen.dtype is placed.wide else seen.to(placed.wide)
        # NDIF runs every request to a half-precision GPU model under autocast
        if torch.is_autocast_enabled(placed.kind):
            with torch.autocast(placed.kind, enabled=False):
                u, signals = law.act(exact, now)
        else:
            u, signals = law.act(exact, now)
        if action.strength != 1:
            u = u * action.strength if action.strength else torch.zeros_like(u)
        return u, signals

    def _control(
        self, action: Action, state: Tensor, selection: Any, whole: bool, carrier: Tensor, here: Tensor
    ) -> tuple[Tensor, Signals]:
        """The control in full shape, zero at unselected tokens, and the signals, NaN there; `here`: where it acts."""
        loop, shape = action.loop, state.shape[:2]
        if selection is None:
            blank = partial(torch.full, shape, torch.nan, device=state.device)
            return torch.zeros_like(carrier), dict.fromkeys(loop.signals, blank)
        part = slice(None) if isinstance(selection, Tensor) or whole else selection
        seen = state[:, part]
        now = self._now[loop.group]
        if loop.summary is not None or loop.tangent is not None or loop.reference is not None:
            summary = None if loop.summary is None else self.aside.summary(loop.summary)
            tangent = None if loop.tangent is None else self.aside.tangent(action.index, loop.act)[:, part]
            reference = None if loop.reference is None else self.sequence.references[loop.reference][:, part]
            now = Now(
                now.layers,
                now.sequence,
                summary=None if summary is None else summary.to(seen.device, wide_of(seen)),
                tangent=None if tangent is None else tangent.to(wide_of(seen)),
                reference=None if reference is None else reference.to(seen.device, wide_of(seen)),
            )
        if isinstance(selection, Tensor) or loop.group in self._apart:
            memory = self.sequence.memory[loop.group]
            u, signals = apart(partial(self._law, action), seen, selection, now, memory, loop.law.signals)
            if memory.rows is not None:
                self._apart.add(loop.group)
        else:
            u, signals = self._law(action, seen, now)
        for schedule in action.schedules:
            u = u * _over(schedule.to(seen).at(self.positions.steps())[:, part], u)
        for number, (gate, placed, table) in enumerate(action.gates):
            if gate.each_token:
                states = [here if site == loop.act else self._states[site.order] for site in gate.sites]
                exact = [x[:, part].to(seen.device) for x in states]
                decided, measured = _exactly(seen.device.type, partial(placed.to(seen).factors, exact))
            else:
                decided, measured = self._decision((action.index, number), gate, placed, seen)
                decided = decided[:, None]
            u = u * _over(decided, u)
            if self._observed:
                signals = gated(signals, decided, {name: measured[own] for own, name in table.items()}, u.shape[:2])
        if not whole:
            u = _spread(u, selection, shape, 0.0)
            if self._observed:
                signals = {name: partial(_spread_of, of, selection, shape) for name, of in signals.items()}
        return u, signals

    def _decision(self, key: Any, gate: Gate, placed: Placed, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """A gate's decision, `[batch]`, and what it measured, `[batch]` each; made once for a prompt."""
        held = self.sequence.decisions.get(key)
        if held is None:
            # what is known of the prompt goes by the summaries of the gate itself, not by those of its copy
            pooled = [self.aside.summary(summary).to(x.device, wide_of(x)) for summary in gate.summaries]
            held = self.sequence.decisions[key] = _exactly(x.device.type, partial(placed.to(x).decide, pooled))
        decided, measured = held
        return decided.to(x.device), measured

    def _publish(
        self, shown: list[Shown], u: Tensor, signals: Signals, error: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Show the signals that somebody looks at to the host's hook points, which may change `u`, and log them.

        Returns:
            u, and the signal `error`, if it was asked for and the loop has it.
        """
        kind, found = u.device.type, None
        if error and "error" in signals:
            found = _exactly(kind, signals["error"])
        for signal, name, kept in shown:
            display = self.display if self.display is not None and self.display.looks(name) else None
            if not kept and display is None:
                continue
            if signal == "u":
                value = u
            elif signal == "u_norm":
                wide = torch.promote_types(u.dtype, torch.float32)
                value = torch.linalg.vector_norm(u.flatten(2), dim=-1, dtype=wide)
            elif signal == "error" and found is not None:
                value = found
            elif signal in signals:
                value = _exactly(kind, signals[signal])
            else:
                continue  # a total that no loop has
            if display is not None:
                value = display.show(name, value)
                u = value if signal == "u" else u
            if kept:
                self._pieces.setdefault(name, []).append((self.positions.past, self._age, value.detach()))
        return u, found

    def _looks(self, name: str, kept: bool) -> bool:
        return kept or (self.display is not None and self.display.looks(name))


#: Behind every site: what `at` compares with where no pass has begun.
_OUTSIDE = (1 << 60, 0)
#: Attributes of a `Pass` that belong to one forward pass.
_OF_PASS = (
    *("sequence", "positions", "_reached", "_observed", "_selection", "_states", "_now", "_apart", "_pieces", "_age"),
)


def _exactly(kind: str, function: Callable[[], Any]) -> Any:
    """What a function gives without autocast, under which NDIF runs every request to a half-precision GPU model."""
    if torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return function()
    return function()


def _whole(selection: Any, length: int) -> bool:
    """Whether all tokens of a pass are selected, as far as that is known without looking at tensors."""
    return isinstance(selection, slice) and selection.stop - selection.start == length


def _spread(value: Tensor, selection: Any, shape: Any, blank: float) -> Tensor:
    """A value at the selected tokens, in the shape of all tokens."""
    if isinstance(selection, slice):
        full = value.new_full((*shape, *value.shape[2:]), blank)
        full[:, selection] = value
        return full
    return torch.where(selection.view(*shape, *[1] * (value.ndim - 2)), value, blank)


def _spread_of(function: Callable[[], Tensor], selection: Any, shape: Any) -> Tensor:
    """A signal, NaN at tokens that are not selected."""
    return _spread(function(), selection, shape, torch.nan)


def _over(factors: Tensor, u: Tensor) -> Tensor:
    """`[batch pos]` in a shape that multiplies `[batch pos ...]`."""
    return factors.view(*factors.shape, *[1] * (u.ndim - 2))
