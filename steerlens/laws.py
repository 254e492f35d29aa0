"""The control laws that several methods share."""

from __future__ import annotations

import torch
from torch import Tensor

from steerlens.core.law import Law, Memory, Setpoint


class Feedback(Law):
    """Linear feedback on a setpoint's error.

        u = K e = c @ gains,   gains = basis @ K',   gains: [m d]

    Only the rows K b of the gain on the setpoint's basis are kept, not K: 4 d flops a token for one direction.

    Args:
        setpoint: Measures the error in coordinates c.
        gains: K applied to each basis vector, `[m d]`.
        matrix: K itself, `[d d]`, kept for inspection only.

    Signals: those of the setpoint, `error` (distance to it, in activation units) among them.
    """

    def __init__(self, setpoint: Setpoint, gains: Tensor, *, matrix: Tensor | None = None):
        self.setpoint = setpoint
        self.gains = gains
        self.matrix = matrix

    @property
    def signals(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of the setpoint."""
        return self.setpoint.signals

    def act(self, x: Tensor, memory: Memory) -> tuple[Tensor, dict[str, Tensor]]:
        """`u = c @ gains`"""
        c, signals = self.setpoint.measure(x, memory)
        return c @ self.gains, signals


class Add(Law):
    """Add a constant vector: `u = v`.

    Args:
        vector: v, of the state's shape without batch and position.
    """

    def __init__(self, vector: Tensor):
        self.vector = vector

    def act(self, x: Tensor, memory: Memory) -> tuple[Tensor, dict[str, Tensor]]:
        """`u = v`, at every token."""
        return self.vector.expand_as(x), {}


class Project(Law):
    """Move the projection on a subspace to a reference point: directional ablation.

        u = (r - x) B' B

    With `r = 0` the state loses the subspace; with `r` the mean of neutral activations it becomes neutral there.

    Args:
        basis: B, orthonormal rows `[m d]`.
        reference: r, `[d]`.

    Signals: `projection` `[batch pos]`, norm of `B (x - r)` before the control, in activation units.
    """

    signals = ("projection",)

    def __init__(self, basis: Tensor, reference: Tensor):
        self.basis = basis
        self.reference = reference

    def act(self, x: Tensor, memory: Memory) -> tuple[Tensor, dict[str, Tensor]]:
        """`u = (r - x) B' B`"""
        c = (self.reference - x) @ self.basis.T
        return c @ self.basis, {"projection": torch.linalg.vector_norm(c, dim=-1)}
