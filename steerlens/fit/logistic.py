"""Logistic regression on a kernel matrix, to its exact optimum."""

from __future__ import annotations

import torch
from torch import Tensor

#: Largest violation of the optimality conditions that is accepted, relative to C.
TOLERANCE = 1e-9


def logistic(
    kernel: Tensor, labels: Tensor, *, C: float = 1.0, intercept: bool = True, max_steps: int = 200
) -> tuple[Tensor, Tensor]:
    """Regularised logistic regression with an unpenalised intercept, in its dual coordinates.

        min_w  1/2 |w|^2 + C sum_i log(1 + exp(-y_i h_i)),   h_i = <w, phi_i> + k,   w = sum_i a_i phi_i

    At the optimum `a_i = C (t_i - p_i)`, with t the labels and p the fitted probabilities. Newton steps on a matrix
    that is never worse conditioned than `C |kernel|`, halved if they would not lower the objective.

    Args:
        kernel: `<phi_i, phi_j>`, `[n n]`, float64; for a linear probe `X X'`, and then `w = X' a`.
        labels: t, `[n]`, 1 or 0.
        C: Inverse strength of the regularisation, as in scikit-learn.
        intercept: Whether there is a k; without one it is 0.
        max_steps: Newton steps before giving up.

    Returns:
        a `[n]` and k `[]`, float64.

    Raises:
        ValueError: only one class.
        RuntimeError: no convergence, which separable classes with a huge C can cause.

    Source: Newton's method on the penalised likelihood (Zhu and Hastie, Kernel logistic regression, 2005). The optimum
    is that of scikit-learn's `LogisticRegression(C=C)` at tolerance 0.
    """
    t = labels.to(kernel.dtype)
    if t.min() == t.max():
        raise ValueError("logistic regression needs both classes")
    a, k = torch.zeros_like(t), torch.logit(t.mean()) * intercept
    h = kernel @ a + k
    loss = _objective(kernel, a, h, t, C)
    for _ in range(max_steps):
        p = torch.sigmoid(h)
        missing = C * (t - p) - a
        if torch.maximum(missing.abs().max(), intercept * missing.sum().abs() / len(t)) <= TOLERANCE * C:
            return a, k
        # p (1 - p) underflows if the probability saturates; the floor only shortens steps there
        root = (p * (1 - p)).clamp(min=1e-14).sqrt()
        system = root[:, None] * kernel * root
        system.diagonal().add_(1 / C)
        factor = torch.linalg.cholesky(system)
        right = torch.stack([root * (h - k) + root * k + (t - p) / root, root], dim=1)
        solved = root[:, None] * torch.cholesky_solve(right, factor)
        k_new = intercept * solved[:, 0].sum() / solved[:, 1].sum()
        a_new = solved[:, 0] - k_new * solved[:, 1]
        a, k, h, loss = _line_search(kernel, (a, k, loss), (a_new, k_new), t, C)
    raise RuntimeError(f"logistic regression did not converge in {max_steps} steps; try a smaller C than {C}")


def linear_probe(x: Tensor, labels: Tensor, *, C: float = 1.0, intercept: bool = True) -> tuple[Tensor, Tensor]:
    """Weights `[d]` and intercept `[]` of a logistic regression on the rows of x `[n d]`, float64."""
    x = x.double()
    a, k = logistic(x @ x.T, labels, C=C, intercept=intercept)
    return x.T @ a, k


def _objective(kernel: Tensor, a: Tensor, h: Tensor, t: Tensor, C: float) -> Tensor:
    return a @ (kernel @ a) / 2 + C * torch.nn.functional.softplus((1 - 2 * t) * h).sum()


def _line_search(
    kernel: Tensor, now: tuple[Tensor, Tensor, Tensor], target: tuple[Tensor, Tensor], t: Tensor, C: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, k, loss = now
    size = 1.0
    for _ in range(40):
        a_new, k_new = a + size * (target[0] - a), k + size * (target[1] - k)
        h_new = kernel @ a_new + k_new
        loss_new = _objective(kernel, a_new, h_new, t, C)
        # at the optimum rounding decides about the last digits
        if loss_new <= loss + 1e-12 * loss.abs():
            break
        size /= 2
    return a_new, k_new, h_new, loss_new
