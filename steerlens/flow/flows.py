"""Following a field for a given distance: fixed-step solvers, great circles, and the law that steers by them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from steerlens.core.law import Law, Signals
from steerlens.core.now import Now
from steerlens.flow.fields import Field

#: Field evaluations per step of each solver.
SOLVERS = {"euler": 1, "midpoint": 2, "rk4": 4, "rk4_38": 4, "geodesic": 1}

#: All of them are made for every token.
MOST_STEPS = 1000


class Flow(Law):
    """Move the state along a field.

        u = x(T) - x,   dx/dt = v(x),   x(0) = x

    v has unit length, so T is an arc length in activation units; with `radians`, `T = distance |x|`. The solver works
    on the field's few coordinates, which is exact for every Runge-Kutta rule, as these commute with linear maps.

    Args:
        field: v.
        distance: T, in activation units, or in radians. Negative: down instead of up.
        steps: Steps of equal length.
        solver: `"euler"`, `"midpoint"`, `"rk4"`, `"rk4_38"` (Kutta's 3/8 rule), `"geodesic"` (Euler steps along great
            circles, which keep |x|), or `"circle"`: the exact solution if `field.straight`; it stops at the field's
            maximum.
        radians: The unit of `distance`.

    Signals: `barrier_before`, `barrier_after`, the field's h at x and at x + u, in logits; `angle_rad`, the angle
    between x and x + u, in radians; all `[batch pos]`.
    """

    signals = ("barrier_before", "barrier_after", "angle_rad")

    def __init__(self, field: Field, distance: float, *, steps: int = 1, solver: str = "rk4", radians: bool = True):
        self.field = field
        self.distance = float(distance)
        self.steps = int(steps)
        self.solver = solver
        self.radians = bool(radians)
        self.validate()

    def validate(self) -> None:
        """The solver fits the field, and the steps can be made."""
        if self.solver not in SOLVERS and self.solver != "circle":
            raise ValueError(f"solver={self.solver!r}; it is one of {', '.join(SOLVERS)} or circle")
        if self.solver == "circle" and not (self.field.straight and self.field.spherical):
            raise ValueError("solver='circle' is exact only if the barrier is linear in the direction; use 'rk4'")
        if self.solver == "geodesic" and not self.field.spherical:
            raise ValueError("solver='geodesic' keeps |x|, which this field does not; use 'rk4'")
        if not 1 <= self.steps <= MOST_STEPS:
            raise ValueError(f"steps={self.steps}; it is a number from 1 to {MOST_STEPS}")

    def act(self, x: Tensor, now: Now) -> tuple[Tensor, Signals]:
        """`u = x(T) - x`"""
        start, outside = self.field.enter(x)
        end = self.follow(start)
        return self.field.leave(start, end, outside), {
            "barrier_before": lambda: self.field.level(start),
            "barrier_after": lambda: self.field.level(end),
            "angle_rad": lambda: angle(start, end),
        }

    def follow(self, z: Tensor) -> Tensor:
        """The flow in the field's coordinates, `[... r+1] -> [... r+1]`."""
        length = z.square().sum(-1, keepdim=True).sqrt() if self.radians else torch.ones_like(z[..., :1])
        if self.solver == "circle":
            return circle(self.field, z, self.distance * length)
        return integrate(self.field.pace, z, self.distance * length, steps=self.steps, solver=self.solver)


def integrate(
    pace: Callable[[Tensor], Tensor], z: Tensor, time: Tensor | float, *, steps: int = 1, solver: str = "rk4"
) -> Tensor:
    """Follow `dz/dt = pace(z)` for a time, which may differ from row to row.

    Args:
        pace: The field, `[... n] -> [... n]`.
        z: First state, `[... n]`.
        time: A number, or `[... 1]`; in the units of z if the field has unit length.
        steps, solver: As in `Flow`.

    Source: Runge-Kutta rules as in Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, II.1; `rk4_38`
    is what torchdiffeq calls rk4.
    """
    rule, step = _RULES[solver], torch.as_tensor(time, dtype=z.dtype, device=z.device) / steps
    for _ in range(steps):
        z = rule(pace, z, step)
    return z


def circle(field: Field, z: Tensor, time: Tensor) -> Tensor:
    """The exact flow of a field whose ascent direction b is the same everywhere: along the great circle through b.

        z(T) = |z| (cos(phi) z/|z| + sin(phi) t),   phi = min(T / |z|, angle(z, b))

    t is the unit tangent towards b; a negative T leads towards -b and stops there.
    """
    norm = (z.square().sum(-1, keepdim=True) + 1e-30).sqrt()
    direction = z / norm
    rise = torch.nn.functional.pad(field.ascent(z[..., :-1]), (0, 1)).expand_as(z)
    along = (rise * direction).sum(-1, keepdim=True)
    tangent = rise - along * direction
    across = (tangent.square().sum(-1, keepdim=True) + 1e-30).sqrt()
    left = torch.atan2(across, along)  # angle to the maximum
    phi = torch.maximum(torch.minimum(time / norm, left), left - torch.pi)
    # cos(phi) - 1 written so that no digits are lost for small angles
    return z + norm * (torch.sin(phi) * (tangent / across) - 2 * torch.sin(phi / 2).square() * direction)


def angle(a: Tensor, b: Tensor) -> Tensor:
    """Angle between two vectors in radians, accurate for small ones; 0 for a zero vector. `[... n] -> [...]`"""
    a, b = (c / torch.linalg.vector_norm(c, dim=-1, keepdim=True).clamp_min(1e-15) for c in (a, b))
    return 2 * torch.atan2(torch.linalg.vector_norm(a - b, dim=-1), torch.linalg.vector_norm(a + b, dim=-1))


def _euler(f: Callable[[Tensor], Tensor], z: Tensor, h: Tensor) -> Tensor:
    return z + h * f(z)


def _midpoint(f: Callable[[Tensor], Tensor], z: Tensor, h: Tensor) -> Tensor:
    return z + h * f(z + h / 2 * f(z))


def _rk4(f: Callable[[Tensor], Tensor], z: Tensor, h: Tensor) -> Tensor:
    k1 = f(z)
    k2 = f(z + h / 2 * k1)
    k3 = f(z + h / 2 * k2)
    k4 = f(z + h * k3)
    return z + h / 6 * (k1 + 2 * (k2 + k3) + k4)


def _rk4_38(f: Callable[[Tensor], Tensor], z: Tensor, h: Tensor) -> Tensor:
    k1 = f(z)
    k2 = f(z + h / 3 * k1)
    k3 = f(z + h * (k2 - k1 / 3))
    k4 = f(z + h * (k1 - k2 + k3))
    return z + h / 8 * (k1 + 3 * (k2 + k3) + k4)


def _geodesic(f: Callable[[Tensor], Tensor], z: Tensor, h: Tensor) -> Tensor:
    """A step along the great circle of the field's direction, which must be tangent to the sphere."""
    norm = (z.square().sum(-1, keepdim=True) + 1e-30).sqrt()
    return torch.cos(h / norm) * z + torch.sin(h / norm) * norm * f(z)


_RULES = {"euler": _euler, "midpoint": _midpoint, "rk4": _rk4, "rk4_38": _rk4_38, "geodesic": _geodesic}
