"""The control of a controller in random directions: what any push of this size does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steerlens.core import Controller, Law, Now, Signals


class RandomDirection(Law):
    """A law whose control keeps its norm at each token and loses its direction, `|u| r`.

    Args:
        law: Computes u.
        direction: r, of the state's shape and norm 1.
    """

    def __init__(self, law: Law, direction: Tensor):
        self.law = law
        self.direction = direction

    def act(self, x: Tensor, now: Now) -> tuple[Tensor, Signals]:
        """The control in the random direction."""
        u, _ = self.law.act(x, now)
        size = u.flatten(2).norm(dim=2)
        return size.view(*size.shape, *[1] * (u.ndim - 2)) * self.direction, {}


def randomized(host: Any, controller: Controller, seed: int) -> Controller:
    """A controller with the same norms of control at every token, and one random direction for each loop.

    Args:
        host: Of the model, for the widths.
        controller: Whose norms are kept, closed loops included: each law sees the states that its random control leads
            to.
        seed: Of the directions.
    """
    generator = torch.Generator().manual_seed(seed)
    loops = []
    for loop in controller.loops:
        direction = torch.randn(host.shape(loop.act), generator=generator)
        loops.append(loop.replace(law=RandomDirection(loop.law, direction / direction.norm())))
    recipe: dict[str, Any] = {"method": "random", "seed": seed, "of": controller.recipe}
    return Controller(loops, recipe | {"model": controller.recipe.get("model")})
