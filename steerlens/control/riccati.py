"""The finite-horizon linear quadratic regulator, one step of the backward recursion at a time."""

from __future__ import annotations

import torch
from torch import Tensor

#: Row blocks in which the symmetric product is computed: 4 save three eighths of it, more make narrow products.
BLOCKS = 4


class CostToGo:
    """The matrix S of the optimal remaining cost `x' S x`, stepped backwards through a plant `x[t+1] = A x + u`.

        K_t = (S_{t+1} + R)^-1 S_{t+1} A_t,     S_t = Q + A_t' M A_t,     M = R (S_{t+1} + R)^-1 S_{t+1}

    minimises `x_T' Qf x_T + sum_t x_t' Q x_t + u_t' R u_t` with `u_t = -K_t x_t` (for an error e = r - x: `u = K e`).
    S is symmetric to the last bit at every step: the antisymmetric part of the rounding errors would grow through A.

    Attributes:
        S: Overwritten at every step; clone it to keep it.

    Args:
        final: S_T = Qf, `[d d]`, symmetric positive semi-definite. Its dtype is the dtype of all that follows.
    """

    def __init__(self, final: Tensor):
        self.S = final.clone()  # every step overwrites it

    @classmethod
    def scalar(
        cls, qf: float, d: int, *, dtype: torch.dtype = torch.float64, device: torch.device | None = None
    ) -> CostToGo:
        """`S_T = qf I`."""
        return cls(torch.eye(d, dtype=dtype, device=device).mul_(qf))

    def step(self, A: Tensor, Q: Tensor | float, R: Tensor | float) -> Tensor:
        """Go back one step and return the gain `K_t`, `[d d]`.

        At most four matrices exist at once, in S's dtype: S, A, and two to work with, of which one becomes the gain.

        Args:
            A: Jacobian of the step, `[d d]`.
            Q, R: Weights of state and control, `[d d]` or a number times the identity.

        Raises:
            ValueError: R is not positive, or the cost is not finite any more.
        """
        A = A.to(self.S)
        K = self._ratio(R) @ A
        # M A = R K
        self._carry(A, R.to(K) @ K if isinstance(R, Tensor) else K, Q, 1.0 if isinstance(R, Tensor) else R)
        return K

    def coast(self, A: Tensor, Q: Tensor | float) -> None:
        """Go back one step at which there is no control: `S_t = Q + A' S_{t+1} A`."""
        A = A.to(self.S)
        self._carry(A, self.S @ A, Q, 1.0)

    def _ratio(self, R: Tensor | float) -> Tensor:
        """`(S + R)^-1 S`"""
        factor = _plus(self.S, R)
        failed = torch.empty((), dtype=torch.int32, device=factor.device)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if failed:
            raise ValueError("S + R is not positive definite; R must be positive and the Jacobians finite")
        # in place, where cholesky_solve copies both its arguments: at width 8192 a matrix is a quarter of a gigabyte
        ratio = self.S.clone()
        torch.linalg.solve_triangular(factor, ratio, upper=False, out=ratio)
        return torch.linalg.solve_triangular(factor.T, ratio, upper=True, out=ratio)

    def _carry(self, A: Tensor, MA: Tensor, Q: Tensor | float, scale: float) -> None:
        """`S = Q + scale A' MA`, of which the upper half is computed, by blocks of rows, and mirrored."""
        d = A.shape[0]
        size = -(-d // BLOCKS)
        for start in range(0, d, size):
            stop = start + size
            torch.mm(A[:, start:stop].T, MA[:, start:], out=self.S[start:stop, start:])
            diagonal = self.S[start:stop, start:stop]
            diagonal.copy_((diagonal + diagonal.T) / 2)
            self.S[stop:, start:stop] = self.S[start:stop, stop:].T
        self.S.mul_(scale)
        if isinstance(Q, Tensor):
            self.S.add_(Q.to(self.S))
        else:
            self.S.diagonal().add_(Q)


def _plus(matrix: Tensor, weight: Tensor | float) -> Tensor:
    """`matrix + weight`, a number standing for that multiple of the identity."""
    if isinstance(weight, Tensor):
        return matrix + weight.to(matrix)
    sum_ = matrix.clone()
    sum_.diagonal().add_(weight)
    return sum_
