"""Where the state should be: setpoints, usable with every feedback law."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from steerlens.core.law import Memory, Setpoint


class Level(Setpoint):
    """Hold the projection on a unit direction at a level: the linear setpoint.

        c = beta - <v, x>,   e = c v

    the shortest way to the hyperplane `<v, x> = beta`.

    Args:
        direction: v, `[d]`, of unit norm; a zero vector asks for nothing.
        level: beta, in activation units.

    Source: A-LQR (arXiv 2604.19018), adaptive linear feature setpoint.
    """

    def __init__(self, direction: Tensor, level: Tensor | float):
        self.basis = direction[None]
        self.level = direction.new_tensor([float(level)])

    def coordinates(self, x: Tensor, memory: Memory) -> Tensor:
        """`[... d] -> [... 1]`"""
        return self.level - linear(x, self.basis)
