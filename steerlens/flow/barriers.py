"""Fitting a barrier: the logistic log-density ratio of two sets of activations, as a field to follow."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from steerlens.fit.logistic import logistic
from steerlens.flow.fields import Cosines, Polynomial, Quadratic
from steerlens.flow.sketch import Sketched, TensorSketch


def exact_barrier(
    positive: Tensor,
    negative: Tensor,
    *,
    degree: int = 2,
    gamma: float = 0.1,
    coef0: float = 1.0,
    C: float = 1.0,
) -> Quadratic | Polynomial:
    """Logistic regression on the polynomial kernel of the activations' directions.

        k(u, u') = (gamma <u, u'> + coef0)^degree,   u = x / |x|

    Args:
        positive, negative: Activations `[n d]`.
        degree, gamma, coef0: Of the kernel.
        C: Inverse regularisation.

    Returns:
        A `Quadratic` for degrees 1 and 2, a `Polynomial` beyond.
    """
    u, labels = directions(positive, negative)
    a, k = logistic((gamma * (u @ u.T) + coef0) ** degree, labels, C=C)
    k = k + _prior(labels)
    basis, points = _span(u)
    if degree > 2:
        return Polynomial(basis, points, a, k, gamma=gamma, coef0=coef0, degree=degree)
    A = torch.zeros(points.shape[1], points.shape[1], dtype=points.dtype)
    if degree == 2:
        A = gamma**2 * (points.T * a) @ points
    b = degree * gamma * coef0 ** (degree - 1) * (a @ points)
    return diagonal(A, b, k + coef0**degree * a.sum(), basis=basis)


def sketched_barrier(
    positive: Tensor, negative: Tensor, sketch: TensorSketch, *, C: float = 1.0
) -> Quadratic | Sketched:
    """The same on a tensor sketch of the kernel; of degree 1 or 2, turned into the quadratic form it is."""
    u, labels = directions(positive, negative)
    features = sketch.features(u)
    a, k = logistic(features @ features.T, labels, C=C)
    if len(sketch.buckets) > 2:
        return Sketched(sketch, features.T @ a, k + _prior(labels))
    A, b, constant = sketch.form(features.T @ a)
    return diagonal(A, b, k + _prior(labels) + constant)


def cosine_barrier(
    positive: Tensor,
    negative: Tensor,
    *,
    components: int | None = None,
    sigma: str | float = "median",
    C: float = 1.0,
    seed: int = 0,
) -> Cosines:
    """Logistic regression on random Fourier features of the activations: the Gaussian kernel of width sigma.

    Args:
        positive, negative: Activations `[n d]`.
        components: Number of features; default d.
        sigma: Width in activation units; `"median"`: the median distance of up to 1000 of the activations, over
            sqrt(2); `"scale"`: sqrt(d/2) times the standard deviation of all their entries.
        C: Inverse regularisation.
        seed: Of the frequencies and phases.
    """
    x = torch.cat([positive, negative]).double()
    labels = _labels(positive, negative)
    n = components or x.shape[1]
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(n, x.shape[1], generator=generator, dtype=x.dtype) / _width(x, sigma, generator)
    phases = 2 * math.pi * torch.rand(n, generator=generator, dtype=x.dtype)
    features = (2 / n) ** 0.5 * torch.cos(x @ W.T + phases)
    a, k = logistic(features @ features.T, labels, C=C)
    basis, frequencies = _span(W)
    return Cosines(basis, frequencies, phases, features.T @ a, k + _prior(labels))


def diagonal(A: Tensor, b: Tensor, constant: Tensor, *, basis: Tensor | None = None) -> Quadratic:
    """The barrier `c'A c + <b, c> + constant`, exactly, in coordinates in which A is diagonal.

    Args:
        A, b, constant: Symmetric `[r r]`, `[r]`, `[]`.
        basis: Orthonormal rows `[r d]` of the coordinates; default the identity.

    Raises:
        ValueError: the barrier is constant.
    """
    basis = torch.eye(len(b), dtype=b.dtype) if basis is None else basis
    if not bool(A.any()):
        return _linear(b, constant, basis)
    values, vectors = torch.linalg.eigh((A + A.T) / 2)
    return Quadratic(vectors.T @ basis, values, vectors.T @ b, constant)


def truncate(field: Quadratic, rank: int) -> Quadratic:
    """The barrier on the span of b and of the eigenvectors of the `rank` largest |a|; with rank 0, b alone.

    b is kept whole, as it dominates with the paper's kernel; what is lost is the pull of the other eigenvectors.
    """
    if rank < 0:
        raise ValueError(f"rank={rank}; it is a number of eigenvectors, or None for all")
    if rank == 0:
        return _linear(field.linear, field.constant, field.basis)
    if rank + 1 >= len(field.linear):
        return field
    leading = field.curvature.abs().argsort(descending=True, stable=True)[:rank]
    unit = torch.zeros(len(field.linear), rank, dtype=field.linear.dtype)
    unit[leading, torch.arange(rank)] = 1
    kept = torch.linalg.qr(torch.cat([field.linear[:, None], unit], dim=1))[0]
    A = kept.T @ (field.curvature[:, None] * kept)
    return diagonal(A, kept.T @ field.linear, field.constant, basis=kept.T @ field.basis)


def _linear(b: Tensor, constant: Tensor, basis: Tensor) -> Quadratic:
    norm = b.norm()
    if norm == 0:
        raise ValueError("the barrier is the same everywhere; do both sides have the same activations?")
    return Quadratic((b / norm @ basis)[None], b.new_zeros(1), norm[None], constant)


def directions(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """Activations of unit length `[n d]`, float64, and their labels `[n]`."""
    x = torch.cat([positive, negative]).double()
    # 1e-12 as in the authors' code; it only keeps a zero row finite
    return x / (x.norm(dim=1, keepdim=True) + 1e-12), _labels(positive, negative)


def _labels(positive: Tensor, negative: Tensor) -> Tensor:
    return torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).double()


def _prior(labels: Tensor) -> Tensor:
    """What turns the log odds into the log density ratio: the odds of the classes' sizes."""
    share = labels.mean()
    return torch.log((1 - share) / share)


def _span(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows `[r d]` that span the given ones, and these in their coordinates `[n r]`."""
    n, d = rows.shape
    if n >= d:
        return torch.eye(d, dtype=rows.dtype), rows
    Q, R = torch.linalg.qr(rows.T)
    return Q.T.contiguous(), R.T.contiguous()


def _width(x: Tensor, sigma: str | float, generator: torch.Generator) -> float:
    if not isinstance(sigma, str):
        return float(sigma)
    if sigma == "scale":
        return math.sqrt(x.shape[1] / 2) * float(x.std())
    if sigma != "median":
        raise ValueError(f"sigma={sigma!r}; it is 'median', 'scale' or a number in activation units")
    # permuted also where all are taken, so that a seed gives the phases that the authors' code draws after it; their
    # median also counts the rounding errors on the diagonal of a distance matrix, and lies up to 1/n below this one
    distances = torch.pdist(x[torch.randperm(len(x), generator=generator)[:1000]])
    return float(distances[distances > 0].median()) / math.sqrt(2)
