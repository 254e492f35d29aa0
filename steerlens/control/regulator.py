"""The solvers of the linear quadratic regulator: gains of every layer from a plant, backwards."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from steerlens.control.linearization import Plant, backwards
from steerlens.control.lowrank import FeatureCostToGo
from steerlens.control.riccati import CostToGo

#: What each solver computes, as a recipe names it.
SOLVERS = {
    "dense": "A-LQR",
    "output": "output-weighted LQR",
    "scalar": "scalar approximation of A-LQR",
}


class Weights:
    """Weights of the cost `sum_t q_t |x_t|^2 + r_t |u_t|^2 + qf |x_T|^2`, or of squared features instead of |x|^2.

    Args:
        q, r: One number, or one for each layer. A number must be positive; of a q for each layer, some may be 0.
        qf: Weight of the last state.
        n_layers: Of the model.

    Raises:
        ValueError: a weight that is not finite or not positive, or another number of them than layers.
    """

    def __init__(self, q: float | Sequence[float], r: float | Sequence[float], qf: float, n_layers: int):
        self.q = _per_layer("q", q, n_layers, zeros=not isinstance(q, (int, float)))
        self.r = _per_layer("r", r, n_layers, zeros=False)
        self.qf = _per_layer("qf", qf, 1, zeros=False)[0]
        # only ratios matter: with the largest r as the unit, a common scale of any size stays out of float32's range
        unit = max(self.r)
        self.q, self.r = [weight / unit for weight in self.q], [weight / unit for weight in self.r]
        self.qf /= unit


class Gain:
    """Abstract: the gain K of one layer, `u = K e`."""

    def rows(self, basis: Tensor) -> Tensor:
        """K applied to directions, `basis @ K'`, `[m d] -> [m d]`."""
        raise NotImplementedError

    def matrix(self) -> Tensor:
        """K itself, `[d d]`."""
        raise NotImplementedError


class DenseGain(Gain):
    """The matrix K, `[d d]`."""

    def __init__(self, K: Tensor):
        self.K = K

    def rows(self, basis: Tensor) -> Tensor:
        """`basis @ K'`"""
        return basis.to(self.K) @ self.K.T

    def matrix(self) -> Tensor:
        """K"""
        return self.K


class FactoredGain(Gain):
    """`K = outputs' inputs`, of rank k.

    Attributes:
        inputs: Gradients of later features with respect to the state before the block, `[k d]`.
        outputs: `[k d]`.
        features: Layer and index of the feature of each row.
    """

    def __init__(self, inputs: Tensor, outputs: Tensor, features: list[tuple[int, int]]):
        self.inputs = inputs
        self.outputs = outputs
        self.features = features

    def rows(self, basis: Tensor) -> Tensor:
        """`basis @ inputs' @ outputs`"""
        return basis.to(self.inputs) @ self.inputs.T @ self.outputs

    def matrix(self) -> Tensor:
        """`outputs' inputs`"""
        return self.outputs.T @ self.inputs


class ScalarGain(Gain):
    """`K = m A`, with the Jacobian applied to directions by the plant."""

    def __init__(self, plant: Plant, t: int, m: float, like: Tensor):
        self.plant, self.t, self.m, self.like = plant, t, m, like

    def rows(self, basis: Tensor) -> Tensor:
        """`m basis @ A'`, one tangent a direction."""
        return self.m * self.plant.push(self.t, basis.to(self.like))

    def matrix(self) -> Tensor:
        """`m A`"""
        return self.m * self.plant.jacobian(self.t).to(self.like)


def solve(
    solver: str,
    plant: Plant,
    weights: Weights,
    controlled: Collection[int],
    features: Sequence[Tensor],
    *,
    device: torch.device,
    progress: bool,
) -> Iterator[tuple[int, Gain]]:
    """Yields `(t, K_t)` of the controlled layers from the last to the first.

    Layers that are not controlled carry the cost on (`B_t = 0`); those before the first controlled one are not visited.

    Args:
        solver: One of `SOLVERS`.
        plant: The linear model.
        weights: Of the cost.
        controlled: Layers with a control.
        features: Directions before each block and after the last, `[m d]` each; only `"output"` uses them.
        device: Where to compute.
        progress: Show a progress bar over the layers.
    """
    layers = backwards(plant, progress=progress, first=min(controlled))
    if solver == "dense":
        # float32 for a float32 plant: gains agree with float64 to 1e-5, the Jacobians themselves to 1e-6
        like = torch.empty(0, dtype=plant.dtype, device=device)
        return _dense(plant, weights, controlled, features[0].shape[-1], layers, like)
    # small matrices, but gradients of many layers; Apple's GPUs have no float64
    like = torch.empty(0, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    if solver == "output":
        return _output(plant, weights, controlled, features, layers, like)
    return _scalar(plant, weights, controlled, layers, like)


def _dense(
    plant: Plant, weights: Weights, controlled: Collection[int], d: int, layers: Iterator[int], like: Tensor
) -> Iterator[tuple[int, Gain]]:
    """The whole state is weighted: one Jacobian and one S exist at a time, the gain of the layer, and work space."""
    cost = CostToGo.scalar(weights.qf, d, dtype=like.dtype, device=like.device)
    for t in layers:
        if t in controlled:
            yield t, DenseGain(cost.step(plant.jacobian(t), weights.q[t], weights.r[t]))
        else:
            cost.coast(plant.jacobian(t), weights.q[t])


def _output(
    plant: Plant,
    weights: Weights,
    controlled: Collection[int],
    features: Sequence[Tensor],
    layers: Iterator[int],
    like: Tensor,
) -> Iterator[tuple[int, Gain]]:
    """Features are weighted: gradients only, the rows of all later features in one batch a block."""
    final, named = _weighted(features[-1].to(like), len(plant), weights.qf)
    cost = FeatureCostToGo(final, weights.qf)
    for t in layers:
        pulled = plant.pull(t, cost.Z) if len(cost.Z) else cost.Z
        present, names = _weighted(features[t].to(like), t, weights.q[t])
        if t in controlled:
            yield t, FactoredGain(pulled, cost.step(pulled, present, weights.q[t], weights.r[t]), named)
        else:
            cost.coast(pulled, present, weights.q[t])
        named = names + named


def _weighted(features: Tensor, t: int, weight: float) -> tuple[Tensor, list[tuple[int, int]]]:
    """The features that the cost contains, and their names: not those of no weight, nor a direction of zeros."""
    kept = [index for index, row in enumerate(features) if weight > 0 and bool(row.any())]
    return features[kept], [(t, index) for index in kept]


def _scalar(
    plant: Plant, weights: Weights, controlled: Collection[int], layers: Iterator[int], like: Tensor
) -> Iterator[tuple[int, Gain]]:
    """S as a multiple of the identity, as if every Jacobian were orthogonal."""
    s = weights.qf
    for t in layers:
        if t in controlled:
            m = s / (s + weights.r[t])
            yield t, ScalarGain(plant, t, m, like)
            s = weights.q[t] + weights.r[t] * m
        else:
            s = weights.q[t] + s


def _per_layer(name: str, value: float | Sequence[float], n_layers: int, *, zeros: bool) -> list[float]:
    given = [value] * n_layers if isinstance(value, (int, float)) else [float(entry) for entry in value]
    if len(given) != n_layers:
        raise ValueError(
            f"{name} has {len(given)} weights for {n_layers} layers; give one number or one for each layer"
        )
    for entry in given:
        if not (entry > 0 or (zeros and entry == 0)) or not math.isfinite(entry):
            raise ValueError(f"{name}={entry}; the weights of the regulator must be positive and finite")
    return [float(entry) for entry in given]
