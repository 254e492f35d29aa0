"""The finite-horizon linear quadratic regulator, one step of the backward recursion at a time."""

from __future__ import annotations

import torch
from torch import Tensor


class CostToGo:
    """The matrix S of the optimal remaining cost `x' S x`, stepped backwards through a plant `x[t+1] = A x + u`.

        K_t = (S_{t+1} + R)^-1 S_{t+1} A_t,     S_t = Q + A_t' M A_t,     M = R (S_{t+1} + R)^-1 S_{t+1}

    minimises `x_T' Qf x_T + sum_t x_t' Q x_t + u_t' R u_t` with `u_t = -K_t x_t` (for an error e = r - x: `u = K e`).
    S is symmetrised at every step: the antisymmetric part of the rounding errors would grow through A.

    Args:
        final: S_T = Qf, `[d d]`, symmetric positive semi-definite. Its dtype is the dtype of all that follows.
    """

    def __init__(self, final: Tensor):
        self.S = final

    @classmethod
    def scalar(
        cls, qf: float, d: int, *, dtype: torch.dtype = torch.float64, device: torch.device | None = None
    ) -> CostToGo:
        """`S_T = qf I`."""
        return cls(qf * torch.eye(d, dtype=dtype, device=device))

    def step(self, A: Tensor, Q: Tensor | float, R: Tensor | float) -> Tensor:
        """Go back one step and return the gain `K_t`, `[d d]`.

        Besides A at most three more matrices of S's dtype exist at once.

        Args:
            A: Jacobian of the step, `[d d]`.
            Q, R: Weights of state and control, `[d d]` or a number times the identity.

        Raises:
            ValueError: R is not positive, or the cost is not finite any more.
        """
        A = A.to(self.S)
        K = self._ratio(R) @ A
        # M A = R K
        self._set(A.T @ (R.to(K) @ K) if isinstance(R, Tensor) else (A.T @ K).mul_(R), Q)
        return K

    def coast(self, A: Tensor, Q: Tensor | float) -> None:
        """Go back one step at which there is no control: `S_t = Q + A' S_{t+1} A`."""
        A = A.to(self.S)
        self._set(A.T @ (self.S @ A), Q)

    def _ratio(self, R: Tensor | float) -> Tensor:
        """`(S + R)^-1 S`"""
        factor, failed = torch.linalg.cholesky_ex(_plus(self.S, R))
        if failed:
            raise ValueError("S + R is not positive definite; R must be positive and the Jacobians finite")
        return torch.cholesky_solve(self.S, factor)

    def _set(self, carried: Tensor, Q: Tensor | float) -> None:
        # the old S goes before the new one is symmetrised: at width 8192 a matrix is half a gigabyte
        self.S = _plus(carried, Q) if isinstance(Q, Tensor) else carried
        self.S = (self.S + self.S.T).div_(2)
        if not isinstance(Q, Tensor):
            self.S.diagonal().add_(Q)


def _plus(matrix: Tensor, weight: Tensor | float) -> Tensor:
    """`matrix + weight`, a number standing for that multiple of the identity."""
    if isinstance(weight, Tensor):
        return matrix + weight.to(matrix)
    sum_ = matrix.clone()
    sum_.diagonal().add_(weight)
    return sum_
