"""Affine maps of the state."""

from __future__ import annotations

from torch import Tensor

from steerlens.core.law import Law, Signals
from steerlens.core.now import Now


class Stretch(Law):
    """An affine map of each coordinate: `u = w * x + b - x`.

    Args:
        slope: w, of the state's shape; no unit.
        shift: b, of the state's shape, in activation units.
    """

    def __init__(self, slope: Tensor, shift: Tensor):
        self.slope = slope
        self.shift = shift

    def act(self, x: Tensor, now: Now) -> tuple[Tensor, Signals]:
        """`u = (w - 1) * x + b`"""
        return (self.slope - 1) * x + self.shift, {}


class Transport(Law):
    """An affine map that is the identity outside a subspace, plus a shift.

        u = g (U'(A - I) U (x - m) + t),   g = 1 or [<w, x> + k <= 0]

    Args:
        basis: U, orthonormal rows `[r d]`.
        stretch: A - I on the subspace, symmetric `[r r]`.
        source: m, `[d]`, in activation units.
        shift: t, `[d]`, in activation units.
        probe: w and k in one vector `[d+1]`, or None for no gate.

    Signals: `gate` `[batch pos]`, g, if there is a probe.
    """

    def __init__(self, basis: Tensor, stretch: Tensor, source: Tensor, shift: Tensor, probe: Tensor | None = None):
        self.basis = basis
        self.stretch = stretch
        self.source = source
        self.shift = shift
        self.probe = probe

    @property
    def signals(self) -> tuple[str, ...]:  # type: ignore[override]
        """`gate` if there is a probe."""
        return () if self.probe is None else ("gate",)

    def act(self, x: Tensor, now: Now) -> tuple[Tensor, Signals]:
        """`u = g (U'(A - I) U (x - m) + t)`"""
        u = ((x - self.source) @ self.basis.T) @ self.stretch @ self.basis + self.shift
        if self.probe is None:
            return u, {}
        gate = (x @ self.probe[:-1] + self.probe[-1] <= 0).to(x.dtype)
        return gate[..., None] * u, {"gate": lambda: gate}
