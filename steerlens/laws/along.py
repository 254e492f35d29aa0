"""Laws that add a fixed vector, depending on the state's projection on it."""

from __future__ import annotations

import torch
from torch import Tensor

from steerlens.core.law import Law, Signals
from steerlens.core.now import Now


class Amplify(Law):
    """Push the state along a vector in proportion to its cosine with it: `u = <v, x>/|x| v`.

    Args:
        vector: v, the state's shape without batch and position.

    Signals: `projection` `[batch pos]`, <v, x>/|v|, in activation units.
    """

    signals = ("projection",)

    def __init__(self, vector: Tensor):
        self.vector = vector

    def act(self, x: Tensor, now: Now) -> tuple[Tensor, Signals]:
        """`u = <v, x>/|x| v`"""
        along = x.flatten(2) @ self.vector.flatten()
        # a zero state has no cosine; the smallest normal number keeps the quotient finite
        norm = torch.linalg.vector_norm(x.flatten(2), dim=-1).clamp_min(torch.finfo(x.dtype).tiny)
        return _along(along / norm, self.vector), {"projection": lambda: along / self.vector.norm()}


class Push(Law):
    """Push the state by a vector, to the side on which it already lies: `u = sgn(<v, x>) v`, sgn(0) = -1.

    Args:
        vector: v, the state's shape without batch and position.

    Signals: `projection` `[batch pos]`, <v, x>/|v|, in activation units.
    """

    signals = ("projection",)

    def __init__(self, vector: Tensor):
        self.vector = vector

    def act(self, x: Tensor, now: Now) -> tuple[Tensor, Signals]:
        """`u = sgn(<v, x>) v`"""
        along = x.flatten(2) @ self.vector.flatten()
        return _along(2 * (along > 0).to(x.dtype) - 1, self.vector), {"projection": lambda: along / self.vector.norm()}


class Sensed(Law):
    """Push the state along one vector in proportion to what another one reads: `u = <g, x> v`.

    Args:
        vector: v, `[d]`, in activation units.
        sensor: g, `[d]`, in units of 1 / activation.

    Signals: `score` `[batch pos]`, <g, x>, no unit.
    """

    signals = ("score",)

    def __init__(self, vector: Tensor, sensor: Tensor):
        self.vector = vector
        self.sensor = sensor

    def act(self, x: Tensor, now: Now) -> tuple[Tensor, Signals]:
        """`u = <g, x> v`"""
        score = x @ self.sensor
        return score[..., None] * self.vector, {"score": lambda: score}


def _along(factor: Tensor, vector: Tensor) -> Tensor:
    return factor.view(*factor.shape, *[1] * vector.ndim) * vector
