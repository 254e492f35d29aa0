"""A law about a token's deviation from its own unsteered state."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from steerlens.core.law import Law, Signals
from steerlens.core.now import Now


class Relative(Law):
    """Let a law see how far steering has moved a token, instead of its state.

        u = law(x - x0),   x0 the unsteered state of the same token

    With a level on a direction v the error is `e = (beta + <v, x0> - <v, x>) v`: the setpoint is the token's own
    feature plus beta. What the token itself varies along v is left alone, and at beta = 0 nothing is asked for.

    Args:
        law: Measures the error of the deviation by its setpoint.
        off: Nothing is asked for, and nothing is added, to the last bit: the states of two passes may differ by
            rounding. Signals are still those of the law.

    Signals: those of the law, but `projection` (`projection_0`, ...) is that of the state, `<v, x>`, and `reference`
    (`reference_0`, ...) that of the unsteered state, `<v, x0>`; all `[batch pos]`, in activation units. `error` is the
    distance to the setpoint, which for one direction is `|beta + reference - projection|`.
    """

    law: Any
    off: bool = False

    def __init__(self, law: Law, off: bool = False):
        self.law = law
        self.off = off
        self.validate()

    def validate(self) -> None:
        """The law has a setpoint."""
        if not hasattr(self.law, "setpoint"):
            raise TypeError(
                f"{type(self.law).__name__} has no setpoint; Relative takes a law of steerlens.laws.feedback"
            )

    @property
    def signals(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of the law, and a reference for each projection."""
        return (*self.law.signals, *(_reference(name) for name in self._projections))

    @property
    def stepwise(self) -> bool:  # type: ignore[override]
        """As the law is."""
        return bool(self.law.stepwise)

    @property
    def _projections(self) -> list[str]:
        return [name for name in self.law.setpoint.signals if name.startswith("projection")]

    def act(self, x: Tensor, now: Now) -> tuple[Tensor, Signals]:
        """`u = law(x - x0)`"""
        own = now.reference
        u, signals = self.law.act(x - own, now)
        setpoint = self.law.setpoint
        absolute = {name: lambda name=name: setpoint.measure(x)[1][name]() for name in self._projections}
        references = {
            _reference(name): lambda name=name: setpoint.measure(own)[1][name]() for name in self._projections
        }
        return u, {**signals, **absolute, **references}


def _reference(projection: str) -> str:
    return "reference" + projection.removeprefix("projection")
