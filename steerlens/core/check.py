"""What is wrong with a controller, found before the model runs: every law, gate and signal is tried once on zeros."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steerlens.core.law import Law, Loop, Setpoint, Signals, legal
from steerlens.core.now import Now
from steerlens.core.numbers import check_numbers
from steerlens.core.part import Part, map_tensors, tensors_of
from steerlens.core.prompt import Condition, Gate
from steerlens.core.signals import COMMON, name_signals
from steerlens.core.sites import Site

#: What `record=` may be; otherwise it names signals.
RECORDS = (None, "scalars", "all")

#: Shape of the state at a site, without batch and position.
Shape = Callable[[Site], tuple[int, ...]]


def check_record(record: object, loops: Sequence[Loop]) -> None:
    """Raises ValueError unless `record` is one of `RECORDS` or names signals that these loops have."""
    if isinstance(record, (tuple, list, set, frozenset)) and all(isinstance(name, str) for name in record):
        known = list(dict.fromkeys([*COMMON, *(name for loop in loops for name in loop.signals)]))
        unknown = sorted(set(record) - set(known))
        if unknown:
            raise ValueError(
                f"record={record!r}: no loop has a signal {' or '.join(map(repr, unknown))}; there are "
                f"{', '.join(known)}"
            )
    elif not (record is None or (isinstance(record, str) and record in RECORDS)):
        raise ValueError(
            f"record={record!r}; it is None, 'scalars', 'all' or a tuple of signal names such as ('u', 'error')"
        )


def check_loops(loops: Sequence[Loop], shape: Shape, dtype: torch.dtype | None = None) -> None:
    """Raises ValueError for a law or gate that does not keep its promises, with its class and site.

    Args:
        dtype: Of the model; a control that it cannot hold is refused.
    """
    check_numbers(loops)
    shared = {loop.group: Now() for loop in loops}
    for loop in sorted(loops, key=lambda loop: loop.act):
        law = map_tensors(loop.law, lambda tensor: tensor.detach().cpu())
        Trial(law, f"the {type(law).__name__} at {loop.act}").run(loop, shape, shared[loop.group], dtype)
        for gate in loop.gates:
            _check_gate(gate, loop, shape)
    taken: dict[str, Site] = {}
    for site, names in name_signals(loops).items():
        for name in names.names():
            if name in taken:
                raise ValueError(f"two signals at {site} would be called {name}; give the loops other names")
            taken[name] = site


class Trial:
    """One law, tried once.

    Args:
        law: On the CPU.
        what: Class and site, as errors name them.
    """

    def __init__(self, law: Law, what: str):
        self.law = law
        self.what = what

    def run(self, loop: Loop, shape: Shape, shared: Now, held: torch.dtype | None) -> None:
        """Raises ValueError, or returns."""
        law, what = self.law, self.what
        if type(law).act is Law.act:
            raise ValueError(f"{what} defines no act(x, now), which returns the control and its signals")
        _check_names(law.signals, what)
        _check_names(law.vectors, what, "vectors")
        if extra := set(law.vectors) - set(law.signals):
            raise ValueError(f"{what} has {', '.join(sorted(extra))} in vectors, but not in signals")
        sensed, acted = shape(loop.sense), shape(loop.act)
        dtype = next((tensor.dtype for tensor in tensors_of(law) if tensor.is_floating_point()), torch.float32)
        now = Now(
            shared.layers,
            shared.sequence,
            summary=torch.zeros(1, *shape(loop.summary.site), dtype=dtype) if loop.summary else None,
            tangent=torch.zeros(1, 1, *acted, dtype=dtype) if loop.tangent else None,
            reference=torch.zeros(1, 1, *shape(loop.reference), dtype=dtype) if loop.reference else None,
        )
        for setpoint in setpoints_of(law):
            _watch(setpoint, f"the {type(setpoint).__name__} of {what}")
        zeros = torch.zeros(1, 1, *sensed, dtype=dtype)
        u, signals = self._pair(_tried(lambda: law.act(zeros, now), what, sensed))
        if u.shape != (1, 1, *acted):
            raise ValueError(f"{what} gives a control of shape {list(u.shape[2:])}, not {list(acted)}")
        if not bool(torch.isfinite(u).all()):
            # a law that divides by |x| has no control at zero; it is refused if it has none elsewhere either
            apart = Now(summary=now._summary, tangent=now._tangent, reference=now._reference)
            u, _ = self._pair(_tried(lambda: law.act(torch.ones_like(zeros), apart), what, sensed))
            if not bool(torch.isfinite(u).all()):
                raise ValueError(f"{what} gives a control that is not finite; is a gain of it too large?")
        most = float("inf") if held is None else torch.finfo(held).max
        size = abs(loop.strength) * float(u.abs().max())
        if most < size < float("inf"):
            raise ValueError(
                f"{what} adds up to {size:.3g} to a state of zeros, and the model's {held} holds at most {most:.3g}; "
                "steer it less"
            )
        self._check_signals(signals, sensed)

    def _pair(self, returned: Any) -> tuple[Tensor, Any]:
        if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[0], Tensor)):
            got = type(returned).__name__
            if isinstance(returned, tuple):
                got = f"tuple of {', '.join(type(entry).__name__ for entry in returned) or 'nothing'}"
            raise ValueError(
                f"act of {self.what} returns a {got}; it returns a pair, the control and its signals: u, {{}}"
            )
        return returned

    def _check_signals(self, signals: Any, sensed: Sequence[int]) -> None:
        law, what = self.law, self.what
        if not isinstance(signals, Mapping):
            raise ValueError(
                f"{what} returns signals as a {type(signals).__name__}; give a mapping of names to functions"
            )
        if set(signals) != set(law.signals):
            returned, declared = (", ".join(sorted(map(str, names))) or "none" for names in (signals, law.signals))
            raise ValueError(f"{what} returns the signals {returned}, but declares {declared}: signals = (...)")
        for name, function in signals.items():
            if not callable(function):
                raise ValueError(
                    f"{what} returns the signal {name!r} as a {type(function).__name__}; it is a function without "
                    f"arguments: {{{name!r}: lambda: ...}}"
                )
            value = _tried(function, f"the signal {name!r} of {what}", sensed)
            if not isinstance(value, Tensor):
                raise ValueError(f"the signal {name!r} of {what} gives a {type(value).__name__}, not a tensor")
            vector = name in law.vectors
            if value.shape[:2] != (1, 1) or (value.ndim > 2) != vector:
                wanted = "[batch pos ...], since it is in vectors" if vector else "[batch pos]"
                hint = "" if vector or value.ndim <= 2 else f"; or declare vectors = ({name!r},)"
                raise ValueError(
                    f"the signal {name!r} of {what} has shape {list(value.shape)} for one row of one token; it has to "
                    f"be {wanted}{hint}"
                )


class MisfitError(ValueError):
    """A setpoint's mistake, as a whole sentence."""


def setpoints_of(value: Any) -> list[Setpoint]:
    """The setpoints in a law, wherever it keeps them."""
    if isinstance(value, (list, tuple)):
        inner = list(value)
    elif isinstance(value, Part):
        inner = list(vars(value).values())
    else:
        return []
    own = [value] if isinstance(value, Setpoint) else []
    return own + [found for entry in inner for found in setpoints_of(entry)]


def _watch(setpoint: Setpoint, what: str) -> None:
    """Let a setpoint, a copy for the trial, check its measurements when its law asks for them."""
    own = setpoint.measure

    def measure(x: Tensor) -> tuple[Tensor, Signals]:
        if type(setpoint).measure is Setpoint.measure:
            raise MisfitError(f"{what} defines no measure(x), which returns coordinates and signals")
        if "error" not in setpoint.signals:
            raise MisfitError(
                f"{what} declares no signal 'error', the distance to the setpoint: signals = ('error', ...)"
            )
        returned = own(x)
        if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[0], Tensor)):
            got = type(returned).__name__
            raise MisfitError(
                f"measure of {what} returns a {got}; it returns a pair, coordinates and signals: c, {{...}}"
            )
        c, signals = returned
        if not isinstance(signals, Mapping) or set(signals) != set(setpoint.signals):
            names = ", ".join(sorted(map(str, signals))) if isinstance(signals, Mapping) else type(signals).__name__
            declared = ", ".join(sorted(setpoint.signals))
            raise MisfitError(f"measure of {what} returns the signals {names or 'none'}, but declares {declared}")
        try:
            lifted = setpoint.lift(c)
        except Exception as error:
            raise MisfitError(
                f"{what} gives coordinates {list(c.shape)} that cannot be lifted to an error: {error}"
            ) from error
        if c.shape[:-1] != x.shape[:-1] or lifted.shape != x.shape:
            raise MisfitError(
                f"{what} gives coordinates {list(c.shape)} and an error {list(lifted.shape)} for states "
                f"{list(x.shape)}; they are [... m], with m rows of the basis, and the error has the states' shape"
            )
        return c, signals

    vars(setpoint)["measure"] = measure


def _check_gate(gate: Gate, loop: Loop, shape: Shape) -> None:
    """Decides once about a zero state."""
    here = map_tensors(gate, lambda tensor: tensor.detach().cpu().float())
    what = f"the {type(gate.condition).__name__}"
    if type(gate.condition).decide is Condition.decide:
        raise ValueError(f"{what} of the loop at {loop.act} defines no decide(pooled)")
    _check_names(gate.condition.signals, what)
    shapes = [list(shape(summary.site)) for summary in gate.summaries]
    try:
        decided, measured = here.decide([torch.zeros(1, *size) for size in shapes])
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"{what} does not fit states of shape {shapes}: {error}") from error
    if decided.shape != (1,):
        raise ValueError(f"{what} gives {list(decided.shape)} numbers for one row, not one")
    if set(measured) != set(gate.condition.signals):
        returned, declared = (", ".join(sorted(names)) or "none" for names in (measured, gate.condition.signals))
        raise ValueError(f"{what} returns the signals {returned}, but declares {declared}: signals = (...)")


def _tried(function: Callable[[], Any], what: str, sensed: Sequence[int]) -> Any:
    try:
        return function()
    except MisfitError as error:
        raise ValueError(str(error)) from error.__cause__
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"{what} does not fit a state of shape {list(sensed)}: {error}") from error
    except Exception as error:
        raise ValueError(
            f"{what} fails when it is tried on a state of shape {list(sensed)}: {type(error).__name__}: {error}"
        ) from error


def _check_names(names: Any, what: str, attribute: str = "signals") -> None:
    """Raises ValueError unless these are legal names of signals, each once, and none that every loop has."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{what} declares {attribute} = {names!r}; it is a tuple of names: {attribute} = ('error',)")
    for name in names:
        if not legal(name):
            raise ValueError(
                f"{what} has a signal {name!r}; a name has letters, digits and underscores, a letter first"
            )
        if name in COMMON:
            raise ValueError(f"{what} has a signal {name!r}, which every loop has; give it another name")
    if len(set(names)) < len(names):
        raise ValueError(f"{what} declares a signal twice: {', '.join(names)}")


def check_lengths(lengths: Any) -> int | list[int]:
    """Prompt lengths, see `Run.scoring`, as a number or a list of numbers.

    Raises:
        TypeError: lengths that are not whole numbers.
        ValueError: none, or one below 1.
    """
    if isinstance(lengths, Tensor):
        lengths = lengths.tolist()
    if isinstance(lengths, int) and not isinstance(lengths, bool):
        rows = [lengths]
    elif isinstance(lengths, (list, tuple)) and all(isinstance(row, int) for row in lengths):
        rows = lengths = list(lengths)
    else:
        raise TypeError(f"prompt_lengths={lengths!r}; give a number of tokens, or one for each row of the batch")
    if not rows or min(rows) < 1:
        raise ValueError(f"prompt_lengths={lengths!r}; a prompt has at least one token")
    return lengths
