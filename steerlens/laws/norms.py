"""Norms that signals report."""

from __future__ import annotations

import torch
from torch import Tensor


def norm(x: Tensor) -> Tensor:
    """Euclidean norm, `[... d] -> [...]`."""
    return torch.linalg.vector_norm(x, dim=-1)


def share(u: Tensor, x: Tensor) -> Tensor:
    """Norm of u over norm of x, `[batch pos ...] -> [batch pos]`, no unit."""
    # a zero state has no share; the smallest normal number keeps the quotient finite
    whole = norm(x.flatten(2)).clamp_min(torch.finfo(x.dtype).tiny)
    return norm(u.flatten(2)) / whole
