"""The regulator of a cost on a few features: the cost-to-go stays of low rank and is stepped by gradients alone."""

from __future__ import annotations

import torch
from torch import Tensor


class FeatureCostToGo:
    """The cost-to-go of a cost on features `<v, x>` in factored form, stepped backwards through `x[t+1] = A x + u`.

    With `Q_t = sum_i q_t v_i v_i'`, over the features of layer t, and `R = r I`, the matrix S of the optimal remaining
    cost is `S_t = Z_t' D_t^-1 Z_t` exactly (push-through identity; D block diagonal):

        Z_t = [v_t; Z_{t+1} A_t],   D_t = diag(1/q_t, D_{t+1} + Z_{t+1} Z_{t+1}' / r)
        K_t = Z_{t+1}' (r D_{t+1} + Z_{t+1} Z_{t+1}')^-1 (Z_{t+1} A_t)

    A row of Z_t is the gradient of a later feature with respect to the state before block t. Rank and memory grow by
    the features of one layer a step, `[k d]`; no `[d d]` matrix exists.

    Args:
        final: Features of the last state, `[m d]`, none of them zero; m may be 0.
        qf: Weight of their squares, positive.
    """

    def __init__(self, final: Tensor, qf: float):
        self.Z = final[:0]
        self.D = final.new_zeros(0, 0)
        self._prepend(final, qf)

    def step(self, pulled: Tensor, features: Tensor, q: float, r: float) -> Tensor:
        """Go back one step and return P of the gain in factored form, `[k d]`.

            K_t = P' (Z_{t+1} A_t)

        Args:
            pulled: `Z_{t+1} A_t`, the gradients pulled back through block t, `[k d]`.
            features: v_t, `[m d]`, none of them zero; m may be 0.
            q, r: Weights of the squared features and of the control, positive.

        Raises:
            ValueError: r is not positive, or a gradient is not finite.
        """
        gram = self.Z @ self.Z.T
        factor, failed = torch.linalg.cholesky_ex(r * self.D + gram)
        if failed:
            raise ValueError("r D + Z Z' is not positive definite; r must be positive and the gradients finite")
        outputs = torch.cholesky_solve(self.Z, factor).contiguous()  # the solver's layout is by columns
        self.Z, self.D = pulled, self.D + gram / r
        self._prepend(features, q)
        return outputs

    def coast(self, pulled: Tensor, features: Tensor, q: float) -> None:
        """Go back one step at which there is no control; arguments as for `step`."""
        self.Z = pulled
        self._prepend(features, q)

    def _prepend(self, features: Tensor, weight: float) -> None:
        self.Z = torch.cat([features, self.Z])
        self.D = torch.block_diag(torch.eye(len(features)).to(self.D) / weight, self.D)
