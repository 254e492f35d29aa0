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

    Signals: `error`, `|c|`; `projection`, `<v, x>`; both `[batch pos]`, in activation units.

    Source: A-LQR (arXiv 2604.19018), adaptive linear feature setpoint.
    """

    signals = ("error", "projection")

    def __init__(self, direction: Tensor, level: Tensor | float):
        self.basis = direction[None]
        self.level = direction.new_tensor([float(level)])

    def measure(self, x: Tensor, memory: Memory) -> tuple[Tensor, dict[str, Tensor]]:
        """`[... d] -> ([... 1], signals)`"""
        projection = linear(x, self.basis)
        c = self.level - projection
        return c, {"error": c[..., 0].abs(), "projection": projection[..., 0]}
