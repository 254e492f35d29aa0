"""What some methods take in place of contrast texts: a setpoint that is known before any text is read."""

from __future__ import annotations

from typing import Any

from steerlens.core.types import Json


class Goal:
    """Abstract: a setpoint with its site, such as features of an autoencoder and their levels."""

    @property
    def arguments(self) -> Json:
        """For a controller's recipe."""
        raise NotImplementedError

    def digest(self) -> str:
        """A hash of the setpoint and its site."""
        raise NotImplementedError


def goals_of(data: Any) -> list[Goal]:
    """The goals among a method's data: of one or a list of them all, of anything else none.

    Raises:
        TypeError: goals and something else in one list.
    """
    each = list(data) if isinstance(data, (list, tuple)) else [data]
    goals = [one for one in each if isinstance(one, Goal)]
    if goals and len(goals) != len(each):
        other = next(one for one in each if not isinstance(one, Goal))
        raise TypeError(
            f"data holds features and a {type(other).__name__}; give features of autoencoders alone, one for a layer, "
            "or contrast texts alone"
        )
    return goals
