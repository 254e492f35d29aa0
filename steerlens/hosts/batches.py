"""Texts of several lengths as one batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def pad(tokens: Any, weights: Any, device: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, mask and pooling weights of some texts, `[text pos]` each, padded on the right."""
    longest = max(len(row) for row in tokens)
    ids = torch.zeros(len(tokens), longest, dtype=torch.long)
    mask = torch.zeros(len(tokens), longest, dtype=torch.long)
    pooled = torch.zeros(len(tokens), longest, dtype=torch.float64)
    for row, (text, weight) in enumerate(zip(tokens, weights, strict=True)):
        ids[row, : len(text)] = torch.as_tensor(text)
        mask[row, : len(text)] = 1
        pooled[row, : len(text)] = torch.as_tensor(weight, dtype=torch.float64)
    return ids.to(device), mask.to(device), pooled.to(device)
