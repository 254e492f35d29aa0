"""How far a loop can deviate from its linear prediction, given the curvature of the blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Lyapunov:
    """Norms in which a linear closed loop `d[t+1] = A_t d[t]` contracts at every step.

        P_T = I,   P_t = A_t' P_{t+1} A_t + I,   |d|_t = sqrt(d' P_t d)

    One step shrinks its norm strictly, `|A_t d|_{t+1}^2 = |d|_t^2 - |d|^2`, whatever the plant: the weights look ahead.

    Args:
        loop: A_t of the closed loop, `[d d]` each, float64 if the device has it.

    Attributes:
        factors: Lower Cholesky factors C_t of P_t, one more than there are steps; `|d|_t = |C_t' d|`.
    """

    def __init__(self, loop: Sequence[Tensor]):
        self.loop = list(loop)
        d = self.loop[0].shape[0]
        P = torch.eye(d).to(self.loop[0])
        self.factors = [P]
        for A in reversed(self.loop):
            P = A.T @ P @ A
            P = (P + P.T) / 2
            P.diagonal().add_(1.0)
            self.factors.append(torch.linalg.cholesky(P))
        self.factors.reverse()

    def norm(self, t: int, d: Tensor) -> Tensor:
        """`|d|_t`, `[... d] -> [...]`."""
        return torch.linalg.vector_norm(d.to(self.factors[t]) @ self.factors[t], dim=-1)

    def dual(self, t: int, z: Tensor) -> Tensor:
        """The largest `<z, d>` over `|d|_t <= 1`, which is `|C_t^-1 z|`; `[... d] -> [...]`."""
        whitened = torch.linalg.solve_triangular(self.factors[t], z.to(self.factors[t])[..., None], upper=False)
        return torch.linalg.vector_norm(whitened[..., 0], dim=-1)

    def steps(self) -> list[Tensor]:
        """The steps in coordinates that make each norm Euclidean: `N_t = C_{t+1}' A_t C_t'^-1`."""
        return [
            torch.linalg.solve_triangular(self.factors[t], A.T @ self.factors[t + 1], upper=False).T
            for t, A in enumerate(self.loop)
        ]

    def contraction(self) -> Tensor:
        """Largest `|A_t d|_{t+1} / |d|_t` of each step, `[step]`; below 1 always."""
        return torch.stack([_largest(step) for step in self.steps()])

    def transitions(self) -> Tensor:
        """Norms of the transition matrices `Phi(k, i) = A_{k-1} ... A_i`, `[T+1 T+1]`, at `[k, i]`; zero for k < i.

        From the norm of step i to that of step k. T^2/2 products and singular values of `[d d]` matrices.
        """
        steps = self.steps()
        T = len(steps)
        norms = torch.eye(T + 1).to(steps[0])
        for i in range(T):
            product = steps[i]
            norms[i + 1, i] = _largest(product)
            for k in range(i + 1, T):
                product = steps[k] @ product
                norms[k + 1, i] = _largest(product)
        return norms


def tracking_bound(transitions: Tensor, curvature: Tensor, deviation: Tensor, initial: Tensor | float) -> Tensor:
    """Upper bound on the deviation from a nominal path at every step, in the norms of `Lyapunov`.

        |d_k|_k <= |Phi(k, 0)| |d_0|_0 + sum_{i<k} |Phi(k, i+1)| (L_i / 2) |d_i|_i^2

    It holds if `|d_{i+1} - A_i d_i|_{i+1} <= (L_i / 2) |d_i|_i^2`, A_i the closed loop. It is an a posteriori bound: it
    needs the deviations that occurred.

    Args:
        transitions: From `Lyapunov.transitions`, `[T+1 T+1]`.
        curvature: L_i, `[T]`.
        deviation: `|d_i|_i`, `[T]` or longer.
        initial: `|d_0|_0`.

    Returns:
        `[T+1]`, its first entry `initial`.

    Source: the tracking-error bound of A-LQR (arXiv 2604.19018). Deviations from the authors' code, which is wrong in
    three places: Phi(k, 0) has all its k factors; the norm of Phi is the largest singular value in the two norms, not
    an eigenvalue of a matrix that is not symmetric; the remainder of step i is measured in the norm of step i + 1.
    """
    T = len(curvature)
    remainder = curvature / 2 * deviation[:T] ** 2
    return transitions[:, 0] * initial + transitions[:, 1:].to(remainder) @ remainder


def _largest(matrix: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(matrix, ord=2)
