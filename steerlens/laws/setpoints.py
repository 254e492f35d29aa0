"""Where the state should be: setpoints, usable with every feedback law."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import linear

from steerlens.core.law import Setpoint, Signals
from steerlens.laws.norms import norm


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
    level: Tensor

    def __init__(self, direction: Tensor, level: Tensor | float):
        self.basis = direction[None]
        self.level = direction.new_tensor([float(level)])

    def measure(self, x: Tensor) -> tuple[Tensor, Signals]:
        """`[... d] -> ([... 1], signals)`"""
        projection = linear(x, self.basis)
        c = self.level - projection
        return c, {"error": lambda: c[..., 0].abs(), "projection": lambda: projection[..., 0]}


class Joint(Setpoint):
    """Hold the projections on several directions at their levels, all at once: the nearest point that does.

        c = (V V')^-1 (beta - V x),   e = c @ V

    However the directions overlap, `V (x + e) = beta`. If they are linearly dependent, least squares.

    Args:
        directions: V, `[m d]`, rows of unit norm; a row of zeros asks for nothing.
        levels: beta, `[m]`, in activation units.

    Signals: `error`, `|e|`; `projection_0`, `projection_1`, ..., each row's `<v, x>`; all `[batch pos]`, in activation
    units.
    """

    levels: Tensor
    inverse: Tensor

    def __init__(self, directions: Tensor, levels: Tensor):
        self.basis = directions
        self.levels = levels.to(directions)
        # directions closer than float32 can tell apart count as one
        gram = directions.double() @ directions.double().T
        self.inverse = torch.linalg.pinv(gram, rtol=1e-6, hermitian=True).to(directions)

    @property
    def signals(self) -> tuple[str, ...]:  # type: ignore[override]
        """`error`, and a projection for each direction."""
        return ("error", *(f"projection_{index}" for index in range(self.basis.shape[0])))

    def measure(self, x: Tensor) -> tuple[Tensor, Signals]:
        """`[... d] -> ([... m], signals)`"""
        projection = linear(x, self.basis)
        c = linear(self.levels - projection, self.inverse)
        return c, _signals(c, self.basis, projection)


class Independent(Setpoint):
    """Pull towards several levels at once, each as if it were alone.

        c = beta - V x,   e = c @ V

    Directions that overlap pull twice: `Joint` reaches the levels, this is the sum of single setpoints.

    Args:
        directions: V, `[m d]`, rows of unit norm; a row of zeros asks for nothing.
        levels: beta, `[m]`, in activation units.

    Signals: `error`, `|e|`; `projection_0`, `projection_1`, ..., each row's `<v, x>`; all `[batch pos]`, in activation
    units.

    Source: the code of A-LQR (arXiv 2604.19018), two concepts at once.
    """

    levels: Tensor

    def __init__(self, directions: Tensor, levels: Tensor):
        self.basis = directions
        self.levels = levels.to(directions)

    @property
    def signals(self) -> tuple[str, ...]:  # type: ignore[override]
        """`error`, and a projection for each direction."""
        return ("error", *(f"projection_{index}" for index in range(self.basis.shape[0])))

    def measure(self, x: Tensor) -> tuple[Tensor, Signals]:
        """`[... d] -> ([... m], signals)`"""
        projection = linear(x, self.basis)
        c = self.levels - projection
        return c, _signals(c, self.basis, projection)


class Range(Setpoint):
    """Keep the projections on directions within ranges, and do nothing where they are: a one- or two-sided hold.

        c = (V V')^-1 g,   e = c @ V,   g_i = lower_i - p_i if p_i < below_i, upper_i - p_i if p_i > above_i, else 0

    with p = V x. A direction outside its range is moved to the range's end, and the others stay where they are, however
    the directions overlap. For one direction e is the shortest way.

    Args:
        directions: V, `[m d]`, rows of unit norm, linearly independent.
        lower, upper: Where a projection outside the range is moved to, `[m]`, in activation units; infinite if there is
            no bound.
        below, above: A projection is outside below or above these, `[m]`; below at most lower, above at least upper.

    Signals: `error`, `|e|`, and `projection` (`projection_0`, `projection_1`, ... for several directions), `<v, x>`, in
    activation units; `acted`, 1 where e is not 0, otherwise 0; all `[batch pos]`.
    """

    unbounded = ("lower", "upper", "below", "above")
    lower: Tensor
    upper: Tensor
    below: Tensor
    above: Tensor
    inverse: Tensor

    def __init__(self, directions: Tensor, lower: Tensor, upper: Tensor, below: Tensor, above: Tensor):
        self.basis = directions
        self.lower = lower.to(directions)
        self.upper = upper.to(directions)
        self.below = below.to(directions)
        self.above = above.to(directions)
        gram = directions.double() @ directions.double().T
        self.inverse = torch.linalg.inv(gram).to(directions).contiguous()

    @property
    def signals(self) -> tuple[str, ...]:  # type: ignore[override]
        """`error`, a projection for each direction, `acted`."""
        count = self.basis.shape[0]
        named = ["projection"] if count == 1 else [f"projection_{index}" for index in range(count)]
        return ("error", *named, "acted")

    def measure(self, x: Tensor) -> tuple[Tensor, Signals]:
        """`[... d] -> ([... m], signals)`"""
        p = linear(x, self.basis)
        # a bound that is infinite is never crossed, and inf - p must not reach a sum
        up = torch.where(p < self.below, self.lower, p)
        gap = torch.where(p > self.above, self.upper, up) - p
        c = gap if self.basis.shape[0] == 1 else linear(gap, self.inverse)
        projections = {name: lambda i=i: p[..., i] for i, name in enumerate(self.signals[1:-1])}
        acted = {"acted": lambda: (gap != 0).any(-1).to(p.dtype)}
        return c, {"error": lambda: norm(c @ self.basis), **projections, **acted}


def _signals(c: Tensor, basis: Tensor, projection: Tensor) -> Signals:
    """One number per token each, so that all of them are recorded as scalars."""
    single = {f"projection_{i}": lambda i=i: projection[..., i] for i in range(basis.shape[0])}
    return {"error": lambda: norm(c @ basis), **single}


class Angle(Setpoint):
    """Turn the state within a plane to an angle, keeping the length of its projection there: the angular setpoint.

        p = B x,   c = |p| (cos a, sin a) - p,   e = c @ B

    Args:
        plane: B, orthonormal rows `[2 d]`; the angle is counted from the first to the second. Zeros ask for nothing.
        angle_rad: a, in radians.

    Signals: `error`, `|e|`, and `projection`, the first of p, in activation units; `angle_rad`, the state's angle in
    the plane, in (-pi, pi]; all `[batch pos]`.

    Source: angular steering (arXiv 2510.26243) as a setpoint, in the history of the code of A-LQR (arXiv 2604.19018).
    """

    signals = ("error", "projection", "angle_rad")
    target: Tensor

    def __init__(self, plane: Tensor, angle_rad: float):
        self.basis = plane
        self.target = plane.new_tensor([math.cos(angle_rad), math.sin(angle_rad)])

    def measure(self, x: Tensor) -> tuple[Tensor, Signals]:
        """`[... d] -> ([... 2], signals)`"""
        p = linear(x, self.basis)
        c = torch.linalg.vector_norm(p, dim=-1, keepdim=True) * self.target - p
        return c, {
            "error": lambda: norm(c),
            "projection": lambda: p[..., 0],
            "angle_rad": lambda: torch.atan2(p[..., 1], p[..., 0]),
        }


class Point(Setpoint):
    """Bring the whole state to a point: one step of a nominal trajectory.

        c = e = r - x

    Args:
        point: r, `[d]`.

    Signals: `error`, `|e|`, `[batch pos]`, in activation units.

    Source: A-LQR (arXiv 2604.19018), tracking of a nominal trajectory.
    """

    signals = ("error",)

    def __init__(self, point: Tensor):
        self.point = point

    @property
    def basis(self) -> Tensor:  # type: ignore[override]
        """The identity, `[d d]`, made anew at each call: laws use `lift`, which does without it."""
        return torch.eye(self.point.shape[0]).to(self.point)

    def measure(self, x: Tensor) -> tuple[Tensor, Signals]:
        """`[... d] -> ([... d], signals)`"""
        e = self.point - x
        return e, {"error": lambda: norm(e)}

    def lift(self, c: Tensor) -> Tensor:
        """The coordinates are the error itself."""
        return c
