"""What a loop does: setpoints measure an error, laws turn a state into a control, a loop says where."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from steerlens.core.sites import Site

if TYPE_CHECKING:
    from steerlens.core.prompt import Direction, Gate, Schedule, Summary

Memory = dict[str, Any]


def observed(memory: Memory) -> bool:
    """Whether somebody asks for signals; where nobody does, a law or setpoint may return none of them."""
    return memory.get("observed", True)


def numbered(name: str, taken: dict[str, int]) -> str:
    """A name, with its count behind it from the second time on: `score`, `score2`. `taken` counts."""
    count = taken.get(name, 0) + 1
    # a name that looks like the second of another one may be there itself
    while count > 1 and f"{name}{count}" in taken:
        count += 1
    taken[name] = count
    found = name if count == 1 else f"{name}{count}"
    taken.setdefault(found, 1)
    return found


class Part:
    """Marks what a controller is made of: objects whose attributes are tensors, plain values, lists or other parts.

    Parts are moved, saved, loaded and sent to a server by walking their attributes (`map_tensors`), so a part needs no
    code of its own for that, and may hold nothing else. For files a part declares its attributes: the parameters of its
    constructor are taken for them, with their types, unless the class body annotates attributes (`gain: float`).

    Attributes:
        unbounded: Names of attributes in which infinity has a meaning; in all others it is refused, and NaN in all.
    """

    unbounded = ()

    def validate(self) -> None:
        """Raises ValueError for values that the part cannot compute with; called for every part that a file brings."""


def map_tensors(value: Any, change: Any) -> Any:
    """A copy of a part, list, tuple or dict with `change` applied to every tensor in it; other values are shared."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Part):
        copy = object.__new__(type(value))
        copy.__dict__.update({name: map_tensors(entry, change) for name, entry in value.__dict__.items()})
        return copy
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(entry, change) for entry in value)
    if isinstance(value, dict):
        return {name: map_tensors(entry, change) for name, entry in value.items()}
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in a part, list, tuple or dict, in a fixed order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(value, note)
    return found


class Setpoint(Part):
    """Abstract: where the state should be.

    A setpoint speaks in coordinates `c` on a small basis, so that a gain can be applied to `m` numbers instead of `d`:

        e = r - x = c @ basis,   basis: [m d], rows of unit norm

    A subclass is final, holds tensors and numbers only, and defines `basis` and `measure`. What a law is told about
    `memory` holds here too.

    Attributes:
        signals: Names of what `measure` reports besides the coordinates; `"error"` is among them.
    """

    basis: Tensor
    signals: tuple[str, ...] = ("error",)

    def measure(self, x: Tensor, memory: Memory) -> tuple[Tensor, dict[str, Tensor]]:
        """The error in coordinates, and signals: `[... d] -> ([... m], {name: [...]})`.

        The signal `error` is the norm of e, the distance to the setpoint in activation units.
        """
        raise NotImplementedError

    def error(self, x: Tensor, memory: Memory) -> Tensor:
        """The error e on the setpoint's subspace, `[... d] -> [... d]`."""
        return self.measure(x, memory)[0] @ self.basis


class Law(Part):
    """Abstract: tensors plus one pure function of the state.

    A subclass is final, holds tensors, numbers, strings and setpoints only, and defines `act`. It sees float32 (or
    float64) states and knows neither layer nor host nor token positions; `memory` is a dict that all loops of its
    controller share during one forward pass, and `memory["sequence"]` one that lives until the sequence ends.
    Signals need to be returned only if `observed(memory)`.

    Attributes:
        signals: Names that `act` returns besides the control itself, each a tensor `[...]` or `[... k]`.
    """

    signals: tuple[str, ...] = ()

    def act(self, x: Tensor, memory: Memory) -> tuple[Tensor, dict[str, Tensor]]:
        """The control to add, and the signals: `[... d] -> ([... d], {name: [...]})`."""
        raise NotImplementedError


class Loop:
    """One feedback loop: a law, the site it acts on, and the site it senses.

    Args:
        law: Computes the control.
        act: The control is added here.
        sense: The state is read here, no later than `act` in the forward pass; default: where it acts.
        where: Token positions: `"last"` (the last real token of a prompt and every token generated after it),
            `"last_prompt"` (that token alone), `"generated"`, `"prompt"`, `"all"`, a slice on absolute positions
            (negative: from the end of the prompt), a boolean mask `[pos]` or `[batch pos]`, or a callable from
            positions `[batch pos]` to such a mask. The names leave position 0 alone, where many models keep an
            activation two orders of magnitude larger than elsewhere; a slice, mask or callable is taken literally.
        strength: Factor on the control.
        name: Prefix of the loop's own signals where several loops act at one layer.
        group: Loops with the same group share `memory`.
        gates: Decisions made once for each row of a prompt, which multiply the control; see `when`.
        schedules: Factors on the control over a generation; see `schedule`.
        summary: What the law finds as `memory["summary"]`: the prompt's pooled state, `[batch ...]`.
        tangent: A direction in the space of the parameters. The law finds as `memory["tangent"]` how the unsteered
            state at the acting site changes along it, in the state's shape; see `cold_fd`.
    """

    __slots__ = (
        "act",
        "gates",
        "group",
        "law",
        "name",
        "schedules",
        "sense",
        "strength",
        "summary",
        "tangent",
        "where",
    )

    def __init__(
        self,
        law: Law,
        act: Site,
        sense: Site | None = None,
        *,
        where: Any = "last",
        strength: float = 1.0,
        name: str = "loop",
        group: int = 0,
        gates: Sequence[Gate] = (),
        schedules: Sequence[Schedule] = (),
        summary: Summary | None = None,
        tangent: Direction | None = None,
    ):
        if sense is not None and act < sense:
            raise ValueError(f"a loop cannot sense {sense}, which comes after {act}, where it acts")
        self.law = law
        self.act = act
        self.sense = act if sense is None else sense
        self.where = where
        self.strength = _number("strength", strength)
        self.name = _legal_name(name)
        self.group = group
        self.gates = tuple(gates)
        self.schedules = tuple(schedules)
        self.summary = summary
        self.tangent = tangent

    @property
    def signals(self) -> tuple[str, ...]:
        """Names of what it reports besides the control: the law's signals, then those of its gates."""
        if not self.gates:
            return self.law.signals
        own = [name for names in self.measured for name in names.values()]
        return tuple(dict.fromkeys([*self.law.signals, "gate", *own]))

    @property
    def measured(self) -> list[dict[str, str]]:
        """What each gate's condition reports, and its name here: the second `score` is `score2`."""
        taken = dict.fromkeys(self.law.signals, 1)
        return [{name: numbered(name, taken) for name in gate.condition.signals} for gate in self.gates]

    @property
    def summaries(self) -> list[Summary]:
        """What it needs to know of the prompt."""
        found = [summary for gate in self.gates for summary in gate.summaries]
        return found if self.summary is None else [*found, self.summary]

    @property
    def parts(self) -> list[Part]:
        """Everything in it that holds tensors."""
        return [part for part in (self.law, *self.gates, *self.schedules, self.summary, self.tangent) if part]

    def change(self, tensors: Any) -> Loop:
        """A copy with a function applied to every tensor."""
        names = ("law", "gates", "schedules", "summary", "tangent")
        return self.replace(**{name: map_tensors(getattr(self, name), tensors) for name in names})

    def replace(self, **changes: Any) -> Loop:
        """A copy with some fields changed."""
        fields = {slot: getattr(self, slot) for slot in self.__slots__} | changes
        return Loop(fields.pop("law"), fields.pop("act"), fields.pop("sense"), **fields)

    def __repr__(self) -> str:
        sensed = "" if self.sense == self.act else f", sense={self.sense!r}"
        return f"Loop({type(self.law).__name__}, {self.act!r}{sensed}, where={self.where!r}, strength={self.strength})"


def _number(what: str, value: Any) -> float:
    if isinstance(value, (str, bytes, bool)):
        raise TypeError(f"{what}={value!r} is a {type(value).__name__}; give a number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{what}={number}; it must be finite")
    return number


def _legal_name(name: Any) -> str:
    """A loop's name goes into hook names, in which a dot separates modules."""
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name={name!r}; the name of a loop consists of letters, digits and underscores")
    return name
