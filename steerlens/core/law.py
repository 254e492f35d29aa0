"""What a loop does: setpoints measure an error, laws turn a state into a control, a loop connects them to sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steerlens.core.now import Now
from steerlens.core.part import Part, map_tensors
from steerlens.core.sites import Site
from steerlens.core.types import Place, Where

if TYPE_CHECKING:
    from steerlens.core.prompt import Direction, Gate, Schedule, Summary

#: How to compute each of several signals. A function is called only if somebody looks at its signal.
Signals = Mapping[str, Callable[[], Tensor]]


def legal(name: str) -> bool:
    """Whether a name can be part of a hook point's: letters, digits and underscores, a letter first."""
    return name.isascii() and name.isidentifier() and name[0] != "_"


def free(name: str, taken: set[str]) -> str:
    """A name that is not taken: itself, or `name2`, `name3`, ...; it is taken from then on."""
    found, count = name, 1
    while found in taken:
        count += 1
        found = f"{name}{count}"
    taken.add(found)
    return found


def finite(name: str, value: Any) -> float:
    """A factor as a float.

    Raises:
        TypeError: not a number.
        ValueError: not finite in float32, in which laws compute.
    """
    if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; give a number")
    number = float(value)
    if not abs(number) <= torch.finfo(torch.float32).max:
        raise ValueError(f"{name}={number}; give a number that is finite in float32")
    return number


class Setpoint(Part):
    """Abstract: where the state should be.

    A setpoint works in coordinates `c` on a small basis, so that a gain can be applied to `m` numbers instead of `d`:

        e = r - x = c @ basis,   basis: [m d], rows of unit norm

    A subclass is final, holds tensors and numbers only, and defines `basis` and `measure`.

    Attributes:
        signals: Names of what `measure` reports in addition to the coordinates; `"error"` is among them.
    """

    basis: Tensor
    signals: tuple[str, ...] = ("error",)

    def measure(self, x: Tensor) -> tuple[Tensor, Signals]:
        """The error in coordinates, and its signals: `[... d] -> ([... m], {name: () -> [...]})`. A pure function.

        The signal `error` is the norm of e, the distance to the setpoint in activation units.
        """
        raise NotImplementedError

    def lift(self, c: Tensor) -> Tensor:
        """The error e of coordinates, `[... m] -> [... d]`."""
        return c @ self.basis

    def error(self, x: Tensor) -> Tensor:
        """The error e on the setpoint's subspace, `[... d] -> [... d]`."""
        return self.lift(self.measure(x)[0])


class Law(Part):
    """Abstract: tensors plus one function of the state.

        x <- x + u,   u = act(x)

    A subclass is final, holds tensors, numbers, strings and setpoints only, and defines `act`. It sees float32 (or
    float64) states and knows neither layer nor host nor token positions. A clipped proportional law:

        class Clipped(Law):
            signals = ("error",)

            def __init__(self, setpoint, gain, most):
                self.setpoint, self.gain, self.most = setpoint, gain, most

            def act(self, x, now):
                c, signals = self.setpoint.measure(x)
                u = self.gain * self.setpoint.lift(c)
                return u.clamp(-self.most, self.most), signals

    Attributes:
        signals: Names of the signals that `act` returns in addition to the control, exactly these.
        vectors: Those of them that have more than one number per token.
        stepwise: What it remembers of a token in `now.sequence` comes from later layers than the one that needs it at
            the next token, so that generated tokens must go through the model one at a time.
        off: Asks for nothing whatever the state is: its control is not added.
    """

    signals: tuple[str, ...] = ()
    vectors: tuple[str, ...] = ()
    stepwise: bool = False
    off: bool = False

    def act(self, x: Tensor, now: Now) -> tuple[Tensor, Signals]:
        """The control to add, and its signals: `[batch pos ...] -> ([batch pos ...], {name: () -> [batch pos]})`.

        Signals are functions without arguments, called after `act` and only if somebody looks at them. One that is
        among `vectors` gives `[batch pos k]`.
        """
        raise NotImplementedError


class Loop:
    """One feedback loop: a law, the site it acts on, and the site it senses.

    Args:
        law: Computes the control.
        act: The control is added here: a `Site`, its hook name, or a layer for its `resid_post`.
        sense: The state is read here, no later than `act` in the forward pass; default: where it acts.
        where: Token positions: `"last"` (the last real token of a prompt and every token generated after it),
            `"last_prompt"` (that token alone), `"generated"`, `"prompt"`, `"all"`, a slice on absolute positions
            (negative: from the end of the prompt), a boolean mask `[pos]` or `[batch pos]`, or a callable from
            positions `[batch pos]` to such a mask, or a part of the text: `after`, `until`, `between`, `assistant`. The
            names and parts leave position 0 alone, where many models keep an activation two orders of magnitude larger
            than elsewhere; a slice, mask or callable is taken literally.
        strength: Factor on the control, no unit; finite.
        name: Prefix of the loop's own signals if several loops act at one site; letters, digits and underscores. Of
            loops with the same name the second is called `name2`.
        group: Loops with the same group share what their laws remember, see `Now`.
        gates: Decisions made once for each row of a prompt, or for each token, which multiply the control; see `when`.
        schedules: Factors on the control over a generation; see `schedule`.
        summary: What the law finds as `now.summary`: the prompt's pooled state, `[batch ...]`.
        tangent: A direction in the space of the parameters. The law finds as `now.tangent` how the unsteered
            state at the acting site changes along it, in the state's shape; see `cold_fd`.
        reference: A site. The law finds as `now.reference` the state that the same tokens have there without any
            steering, which a second pass of the model computes; see `steerlens.laws.relative`.

    Raises:
        TypeError: `law` is not an instance of a law, or the strength is not a number.
        ValueError: it would sense after it acts, or a gate would that decides for each token; no such site; an illegal
            name; a strength that is not finite.
    """

    __slots__ = (
        "act",
        "gates",
        "group",
        "law",
        "name",
        "reference",
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
        act: Place,
        sense: Place | None = None,
        *,
        where: Where = "last",
        strength: float = 1.0,
        name: str = "loop",
        group: int = 0,
        gates: Sequence[Gate] = (),
        schedules: Sequence[Schedule] = (),
        summary: Summary | None = None,
        tangent: Direction | None = None,
        reference: Place | None = None,
    ):
        if not isinstance(law, Law):
            if isinstance(law, type):
                raise TypeError(f"a loop needs a law, it got the class {law.__name__}; make one: {law.__name__}(...)")
            raise TypeError(f"a loop needs a law, it got a {type(law).__name__}; a law is a subclass of steerlens.Law")
        self.law = law
        self.act = Site.of(act)
        self.sense = self.act if sense is None else Site.of(sense)
        if self.act < self.sense:
            raise ValueError(f"a loop cannot sense {self.sense}, which comes after {self.act}, where it acts")
        if not (isinstance(name, str) and legal(name)):
            raise ValueError(f"name={name!r}; a loop's name has letters, digits and underscores, a letter first")
        self.where = where
        self.strength = finite("strength", strength)
        self.name = name
        self.group = group
        self.gates = tuple(gates)
        self.schedules = tuple(schedules)
        self.summary = summary
        self.tangent = tangent
        self.reference = None if reference is None else Site.of(reference)
        for site in self.gated_by:
            if self.act < site:
                raise ValueError(
                    f"a gate cannot decide for each token by {site}, which comes after {self.act}, where the loop "
                    f"acts; fit it with gate_layers=range({max(self.act.layer, 1)})"
                )

    @property
    def factor(self) -> float:
        """What the control is multiplied by: the strength, or 0 if the law is off."""
        return 0.0 if self.law.off else self.strength

    @property
    def signals(self) -> tuple[str, ...]:
        """Names of what it reports in addition to the control: the law's signals, then those of its gates."""
        if not self.gates:
            return self.law.signals
        own = [name for names in self.measured for name in names.values()]
        return tuple(dict.fromkeys([*self.law.signals, "gate", *own]))

    @property
    def measured(self) -> list[dict[str, str]]:
        """What each gate's condition reports, and its name here: the second `score` is `score2`."""
        taken = {"u", "u_norm", "gate", *self.law.signals}
        return [{name: free(name, taken) for name in gate.condition.signals} for gate in self.gates]

    @property
    def summaries(self) -> list[Summary]:
        """What it needs to know of the prompt."""
        found = [summary for gate in self.gates if not gate.each_token for summary in gate.summaries]
        return found if self.summary is None else [*found, self.summary]

    @property
    def gated_by(self) -> list[Site]:
        """Where gates that decide for each token read its state."""
        return [summary.site for gate in self.gates if gate.each_token for summary in gate.summaries]

    @property
    def sensed(self) -> set[Site]:
        """Sites of the pass, other than where it acts, whose states it needs."""
        return {self.sense, *self.gated_by} - {self.act}

    @property
    def needs_more_than_state(self) -> bool:
        """Whether it needs a summary of the prompt, a tangent or a reference, which may take a second pass."""
        return bool(self.summaries) or self.tangent is not None or self.reference is not None

    @property
    def parts(self) -> list[Part]:
        """Everything in it that holds tensors."""
        return [part for part in (self.law, *self.gates, *self.schedules, self.summary, self.tangent) if part]

    def change(self, tensors: Callable[[Tensor], Tensor]) -> Loop:
        """A copy with a function applied to every tensor."""
        names = ("law", "gates", "schedules", "summary", "tangent")
        return self.replace(**{name: map_tensors(getattr(self, name), tensors) for name in names})

    def replace(self, **changes: Any) -> Loop:
        """A copy with some fields changed."""
        fields = {slot: getattr(self, slot) for slot in self.__slots__} | changes
        return Loop(fields.pop("law"), fields.pop("act"), fields.pop("sense"), **fields)

    def __repr__(self) -> str:
        sensed = "" if self.sense == self.act else f", sense={self.sense!r}"
        # a mask's shape, not its numbers
        where = f"mask {list(self.where.shape)}" if isinstance(self.where, Tensor) else repr(self.where)
        more = [f"{name}={value!r}" for name in ("gates", "schedules") if (value := getattr(self, name))]
        shown = ", ".join([f"where={where}", f"strength={self.strength}", *more])
        return f"Loop({self.law!r}, {self.act!r}{sensed}, {shown})"
