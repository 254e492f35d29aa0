"""The setpoint on features of a sparse autoencoder: slices of it, which are sent and saved without sae-lens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from steerlens.core.law import Setpoint, Signals
from steerlens.laws.norms import norm

#: Rounds of `measure` where the input is normalised. Each leaves a share of the miss of the order of |u| / |x|.
ROUNDS = 30
NORMALISATIONS = ("none", "constant_norm_rescale", "layer_norm")


class Feature(Setpoint):
    """Hold features of a sparse autoencoder in a range, measured by its own encoder.

        z_i = <w_i, x> / s(x) + b_i,   activation a_i = max(z_i, 0) if z_i > theta_i else 0
        c = s(x) (clip(z, lower, upper) - z) (B W')^-1,   e = c @ B

    The activation of a feature that is off is 0, but its pre-activation z is known, so that it can be raised. A feature
    within its range causes no control, and the others' controls do not move it. s = 1 for an autoencoder without input
    normalisation: then `x + e` has exactly the level, in one step, however the features overlap. With normalisation,
    s(x + e) differs from s(x), and the equation is solved by rounds, which converge while |e| is small compared with
    |x|.

    Args:
        sensor: w, rows `[m d]`.
        bias: b, `[m]`, in activation units of the autoencoder.
        threshold: theta, `[m]`, at or below which an activation is 0.
        lower, upper: Range of z, `[m]`; infinite if there is no bound.
        basis: B, the directions to move along, rows of unit norm `[m d]`.
        normalise: What s is: `"none"` (1), `"constant_norm_rescale"` (`|x| / sqrt(d)`) or `"layer_norm"` (the standard
            deviation; w then has mean zero).
        labels: A name for each feature, used in the signals' names if there are several.

    Signals: `error`, `|e|`, distance to the range along the basis, in units of the residual stream; `feature`, the
        activation a before this control, in units of the autoencoder (`feature_12`, `feature_80`, ..., by label,
    for several); all `[batch pos]`.
    """

    unbounded = ("lower", "upper")
    sensor: Tensor
    bias: Tensor
    threshold: Tensor
    lower: Tensor
    upper: Tensor
    normalise: str
    labels: list[str]
    inverse: Tensor

    def __init__(
        self,
        sensor: Tensor,
        bias: Tensor,
        threshold: Tensor,
        lower: Tensor,
        upper: Tensor,
        basis: Tensor,
        *,
        normalise: str = "none",
        labels: list[str],
    ):
        self.sensor = sensor
        self.bias = bias
        self.threshold = threshold
        self.lower = lower
        self.upper = upper
        self.basis = basis
        self.normalise = normalise
        self.labels = labels
        # the solver's layout is by columns, a file's by rows, and the last bits of a product depend on it
        self.inverse = torch.linalg.inv(basis.double() @ sensor.double().T).to(sensor).contiguous()
        self.validate()

    def validate(self) -> None:
        """The normalisation is known, and every feature has a name of its own that can be part of a hook name."""
        if self.normalise not in NORMALISATIONS:
            raise ValueError(f"normalise={self.normalise!r}; it is one of {', '.join(NORMALISATIONS)}")
        legal = all(label.isalnum() for label in self.labels) and len(set(self.labels)) == len(self.labels)
        if not legal or len(self.labels) != len(self.sensor):
            raise ValueError(f"labels={self.labels!r}; give each of {len(self.sensor)} features a number or name")

    @property
    def signals(self) -> tuple[str, ...]:  # type: ignore[override]
        """`error`, and the activation of each feature."""
        if len(self.labels) == 1:
            return ("error", "feature")
        return ("error", *(f"feature_{label}" for label in self.labels))

    def preactivation(self, x: Tensor) -> Tensor:
        """z, `[... d] -> [... m]`."""
        return linear(x, self.sensor) / self._scale(x) + self.bias

    def activation(self, z: Tensor) -> Tensor:
        """The activations at pre-activations, `[... m] -> [... m]`."""
        return torch.where(z > self.threshold, z, 0.0).clamp(min=0.0)

    def measure(self, x: Tensor) -> tuple[Tensor, Signals]:
        """`[... d] -> ([... m], signals)`"""
        z = self.preactivation(x)
        goal = torch.minimum(torch.maximum(z, self.lower), self.upper)
        c = linear((goal - z) * self._scale(x), self.inverse.T)
        if self.normalise != "none":
            for _ in range(ROUNDS - 1):
                moved = x + c @ self.basis
                c = c + linear((goal - self.preactivation(moved)) * self._scale(moved), self.inverse.T)
        activations = {name: lambda i=i: self.activation(z)[..., i] for i, name in enumerate(self.signals[1:])}
        return c, {"error": lambda: norm(c @ self.basis), **activations}

    def _scale(self, x: Tensor) -> Tensor:
        """s(x), `[... d] -> [... 1]`."""
        if self.normalise == "constant_norm_rescale":
            return torch.linalg.vector_norm(x, dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        if self.normalise == "layer_norm":
            # sae-lens's own epsilon, and its standard deviation, that of a sample
            return x.std(dim=-1, keepdim=True) + 1e-5
        return torch.ones_like(x[..., :1])
