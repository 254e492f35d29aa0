"""Texts of several lengths as one batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Token ids of a prompt and of what follows it.
Row = tuple[list[int], list[int]]


def pad_rows(tokens: Any, device: Any) -> tuple[Tensor, Tensor]:
    """Token ids and mask of some texts, `[text pos]` each, padded on the right."""
    longest = max(len(row) for row in tokens)
    ids = torch.zeros(len(tokens), longest, dtype=torch.long)
    mask = torch.zeros(len(tokens), longest, dtype=torch.long)
    for row, text in enumerate(tokens):
        ids[row, : len(text)] = torch.as_tensor(text)
        mask[row, : len(text)] = 1
    return ids.to(device), mask.to(device)


def pad(tokens: Any, weights: Any, device: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As `pad_rows`, and the pooling weights of the texts' tokens, `[text pos]`, float64."""
    ids, mask = pad_rows(tokens, device)
    pooled = torch.zeros(ids.shape, dtype=torch.float64)
    for row, (text, weight) in enumerate(zip(tokens, weights, strict=True)):
        pooled[row, : len(text)] = torch.as_tensor(weight, dtype=torch.float64)
    return ids, mask, pooled.to(device)
