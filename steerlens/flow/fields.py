"""Vector fields on the state that climb a barrier, and the small subspace in which they can be followed exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from steerlens.core.part import Part

#: Keeps the zero state, on which every law is tried, free of NaN.
_TINY = 1e-30


class Field(Part):
    """Abstract: the direction of steepest ascent of a barrier h(x), as a field of unit vectors.

        v(x) = grad h(x) / |grad h(x)|,   v(x) in span(x, basis)

    The second statement is a certificate: a flow along v never leaves the span of its first state and `basis`, so that
    it can be followed in `r + 1` numbers instead of `d`. They are

        z = (U x, |x - U'U x|),   U = basis [r d], orthonormal rows

    and the map is an isometry: arc lengths and angles in z are those in x.

    A subclass is final and defines h and its ascent direction in the coordinates `c = U x`. If `spherical` is true, h
    depends on the direction of x alone: `c` then is `U x / |x|`, and the gradient is the ascent direction projected on
    the tangent space of the sphere, so that an exact flow keeps |x|.

    Attributes:
        basis: U.
        spherical: See above.
        straight: The ascent direction is the same everywhere, so that on the sphere the flow is a great circle.
    """

    basis: Tensor
    spherical: bool = True
    straight: bool = False

    def height(self, c: Tensor) -> Tensor:
        """The barrier in coordinates, `[... r] -> [...]`."""
        raise NotImplementedError

    def ascent(self, c: Tensor) -> Tensor:
        """Its derivative with respect to the coordinates, `[... r] -> [... r]`."""
        raise NotImplementedError

    def enter(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """State to reduced state, and what of x lies outside the basis: `[... d] -> ([... r+1], [... d])`."""
        c = x @ self.basis.T
        outside = x - c @ self.basis
        # the floor is far below rounding; without it a state inside the basis would have no direction outside it
        floor = 1e-24 * x.square().sum(-1, keepdim=True) + _TINY
        return torch.cat([c, (outside.square().sum(-1, keepdim=True) + floor).sqrt()], dim=-1), outside

    def leave(self, start: Tensor, end: Tensor, outside: Tensor) -> Tensor:
        """What a move in reduced coordinates adds to the state, `[... d]`."""
        moved = end[..., :-1] - start[..., :-1]
        return moved @ self.basis + (end[..., -1:] / start[..., -1:] - 1) * outside

    def slope(self, z: Tensor) -> Tensor:
        """Gradient of h at a reduced state, times |x| where `spherical`, `[... r+1] -> [... r+1]`."""
        if not self.spherical:
            return torch.nn.functional.pad(self.ascent(z[..., :-1]), (0, 1))
        direction = z / _norm(z)
        rise = torch.nn.functional.pad(self.ascent(direction[..., :-1]), (0, 1))
        return torch.addcmul(rise, (rise * direction).sum(-1, keepdim=True), direction, value=-1)

    def pace(self, z: Tensor) -> Tensor:
        """The unit field at a reduced state, `[... r+1] -> [... r+1]`."""
        slope = self.slope(z)
        return slope / _norm(slope)

    def level(self, z: Tensor) -> Tensor:
        """The barrier at a reduced state, `[... r+1] -> [...]`."""
        return self.height((z / _norm(z) if self.spherical else z)[..., :-1])

    def value(self, x: Tensor) -> Tensor:
        """The barrier, `[... d] -> [...]`."""
        return self.level(self.enter(x)[0])

    def velocity(self, x: Tensor) -> Tensor:
        """The unit field, `[... d] -> [... d]`."""
        z, outside = self.enter(x)
        v = self.pace(z)
        return v[..., :-1] @ self.basis + v[..., -1:] / z[..., -1:] * outside


class Quadratic(Field):
    """A quadratic form of the state's direction, in the coordinates in which it is diagonal.

        h(x) = sum_i a_i c_i^2 + <b, c> + k,   c = U x / |x|

    Every logistic regression on a polynomial kernel of degree 2 is of this form, sketched or not. With a = 0 the flow
    is a great circle.

    Args:
        basis: U, orthonormal rows `[r d]`.
        curvature: a, `[r]`, in logits.
        linear: b, `[r]`, in logits.
        constant: k, one number, in logits.

    Source: ODESteer (arXiv 2602.17560), whose tensor sketch it replaces.
    """

    def __init__(self, basis: Tensor, curvature: Tensor, linear: Tensor, constant: Tensor):
        self.basis = basis
        self.curvature = curvature
        self.linear = linear
        self.constant = constant.reshape(1)
        self.straight = not bool(curvature.any())

    def height(self, c: Tensor) -> Tensor:
        """`sum_i a_i c_i^2 + <b, c> + k`"""
        return (c * (self.curvature * c + self.linear)).sum(-1) + self.constant[0]

    def ascent(self, c: Tensor) -> Tensor:
        """`2 a c + b`"""
        return 2 * self.curvature * c + self.linear


class Polynomial(Field):
    """A weighted sum of polynomial kernels between the state's direction and given points.

        h(x) = sum_i w_i (g <p_i, c> + c0)^D + k,   c = U x / |x|

    Args:
        basis: U, orthonormal rows `[r d]` that span the points.
        points: p, `[n r]`, unit vectors in the coordinates.
        weights: w, `[n]`, in logits.
        constant: k, one number, in logits.
        gamma, coef0, degree: g, c0 and D of the kernel.

    Source: the kernel of ODESteer (arXiv 2602.17560) without its sketch, for any degree.
    """

    def __init__(
        self,
        basis: Tensor,
        points: Tensor,
        weights: Tensor,
        constant: Tensor,
        *,
        gamma: float,
        coef0: float,
        degree: int,
    ):
        self.basis = basis
        self.points = points
        self.weights = weights
        self.constant = constant.reshape(1)
        self.gamma, self.coef0, self.degree = float(gamma), float(coef0), int(degree)

    def height(self, c: Tensor) -> Tensor:
        """`sum_i w_i (g <p_i, c> + c0)^D + k`"""
        return (self.gamma * (c @ self.points.T) + self.coef0) ** self.degree @ self.weights + self.constant[0]

    def ascent(self, c: Tensor) -> Tensor:
        """`sum_i w_i D g (g <p_i, c> + c0)^(D-1) p_i`"""
        kernel = (self.gamma * (c @ self.points.T) + self.coef0) ** (self.degree - 1)
        return (self.degree * self.gamma * self.weights * kernel) @ self.points


class Cosines(Field):
    """A sum of random cosines of the state: a logistic regression on random Fourier features.

        h(x) = sqrt(2/n) sum_i w_i cos(<m_i, c> + p_i) + k,   c = U x

    It depends on the length of the state too, so that its flow does not stay on a sphere.

    Args:
        basis: U, orthonormal rows `[r d]` that span the frequencies.
        frequencies: m, `[n r]`, in the coordinates, per activation unit.
        phases: p, `[n]`, in radians.
        weights: w, `[n]`, in logits.
        constant: k, one number, in logits.

    Source: the random-feature ablation of ODESteer (arXiv 2602.17560).
    """

    spherical = False

    def __init__(self, basis: Tensor, frequencies: Tensor, phases: Tensor, weights: Tensor, constant: Tensor):
        self.basis = basis
        self.frequencies = frequencies
        self.phases = phases
        self.weights = weights
        self.constant = constant.reshape(1)

    def height(self, c: Tensor) -> Tensor:
        """`sqrt(2/n) sum_i w_i cos(<m_i, c> + p_i) + k`"""
        waves = torch.cos(c @ self.frequencies.T + self.phases)
        return (2 / len(self.phases)) ** 0.5 * (waves @ self.weights) + self.constant[0]

    def ascent(self, c: Tensor) -> Tensor:
        """`-sqrt(2/n) sum_i w_i sin(<m_i, c> + p_i) m_i`"""
        waves = torch.sin(c @ self.frequencies.T + self.phases)
        return -((2 / len(self.phases)) ** 0.5) * ((waves * self.weights) @ self.frequencies)


def _norm(z: Tensor) -> Tensor:
    # one operation where a sum of squares takes three: for one token the number of operations is the cost
    return torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp_min(_TINY**0.5)
