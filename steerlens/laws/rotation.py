"""Laws that turn the state in a plane."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from steerlens.core.law import Law, Signals
from steerlens.core.now import Now


class Turn(Law):
    """Set the angle of the state's projection on a plane.

        u = g (|P x| (cos(theta) b1 + sin(theta) b2) - P x),   g = 1 or [<b1, x> > 0]

    Args:
        plane: b1 and b2, orthonormal, `[2 d]`.
        angle_rad: theta, in radians.
        adaptive: Gate by the sign of `<b1, x>`.

    Signals: `angle_rad` `[batch pos]`, the angle before, in radians; `gate` `[batch pos]`, g, if adaptive.
    """

    def __init__(self, plane: Tensor, angle_rad: float, *, adaptive: bool = False):
        self.plane = plane
        self.angle_rad = float(angle_rad)
        self.adaptive = bool(adaptive)

    @property
    def signals(self) -> tuple[str, ...]:  # type: ignore[override]
        """`angle_rad`, and `gate` if adaptive."""
        return ("angle_rad", "gate") if self.adaptive else ("angle_rad",)

    def act(self, x: Tensor, now: Now) -> tuple[Tensor, Signals]:
        """`u = g (|P x| (cos(theta) b1 + sin(theta) b2) - P x)`"""
        c = x @ self.plane.T
        # a state outside the plane has no angle in it; the floor, far below rounding, keeps its gradient finite
        radius = (c.square().sum(-1, keepdim=True) + 1e-30).sqrt()
        wanted = torch.cat([radius * math.cos(self.angle_rad), radius * math.sin(self.angle_rad)], dim=-1)
        u = (wanted - c) @ self.plane
        signals: Signals = {"angle_rad": lambda: torch.atan2(c[..., 1], c[..., 0])}
        if not self.adaptive:
            return u, signals
        gate = (c[..., 0] > 0).to(x.dtype)
        return gate[..., None] * u, {**signals, "gate": lambda: gate}


class PseudoRotation(Law):
    """Turn states on the negative side of a hyperplane, in the plane of the state and the hyperplane's normal.

        u = [<w, x> <= 0] (|x| (cos(g) x/|x| + sin(g) t) - x),   g = alpha pi sigmoid(f(x))

    Args:
        probe: w, `[d]`; only its direction counts.
        weights: Of f, one matrix `[out in]` a layer, from d to 1.
        biases: Of f, `[out]` each.
        alpha: Factor on the angle.

    Signals: `gate` `[batch pos]`, 1 if the state is rotated, else 0; `angle_rad` `[batch pos]`, the angle of the
    rotation, in radians.
    """

    signals = ("gate", "angle_rad")

    def __init__(self, probe: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], alpha: float = 1.0):
        if not weights or len(weights) != len(biases):
            raise ValueError(
                f"the angle network has {len(weights)} weights and {len(biases)} biases; train it first, with hpr() or "
                "fit_angle()"
            )
        if weights[0].shape[1] != len(probe) or weights[-1].shape[0] != 1:
            shapes = [list(weight.shape) for weight in weights]
            raise ValueError(f"an angle network of shapes {shapes} does not map a state of {len(probe)} to one angle")
        self.probe = probe
        self.weights = list(weights)
        self.biases = list(biases)
        self.alpha = float(alpha)

    def act(self, x: Tensor, now: Now) -> tuple[Tensor, Signals]:
        """`u = [<w, x> <= 0] (|x| (cos(g) x/|x| + sin(g) t) - x)`"""
        gate = (x @ self.probe <= 0).to(x.dtype)
        turned = gate * self.alpha * predict_angle(x, self.weights, self.biases)
        return gate[..., None] * rotate(x, self.probe, turned), {"gate": lambda: gate, "angle_rad": lambda: turned}


def rotate(x: Tensor, probe: Tensor, turned: Tensor) -> Tensor:
    """What is added to x when it is turned by an angle `[...]` towards `probe`, `[... d]`.

    A state that is a multiple of the probe has no such plane: it is only scaled by the cosine.
    """
    normal = probe / probe.norm()
    # the floor is far below rounding; a zero state has no direction
    norm = (x.square().sum(-1, keepdim=True) + 1e-30).sqrt()
    direction = x / norm
    tangent = normal - (direction @ normal)[..., None] * direction
    tangent = tangent / (tangent.square().sum(-1, keepdim=True) + 1e-30).sqrt()
    g = turned[..., None]
    # cos(g) - 1 written so that no digits are lost for small angles
    return norm * (torch.sin(g) * tangent - 2 * torch.sin(g / 2).square() * direction)


def predict_angle(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """`pi sigmoid(f(x))`, f a chain of linear maps with GELU between them, `[... d] -> [...]`."""
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        x = gelu(linear(x, weight, bias))
    return math.pi * torch.sigmoid(linear(x, weights[-1], biases[-1])[..., 0])
