"""Attention whose gradient can be batched and differentiated again, in one thread only; travels to servers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class PlainAttention(TorchFunctionMode):
    """While active, scaled dot product attention is computed in plain operations.

    `torch.nn.attention.sdpa_kernel` does the same by switches of the process: two threads that overlap would change
    each other's attention, and could leave the switches as neither found them. A function mode belongs to its thread.

    Upstream: torch (2.13) chooses attention's kernel for the whole process; goes with a choice by thread.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(function, "__name__", "") == "scaled_dot_product_attention":
            return _attend(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _attend(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
    options = {"scale": scale, "enable_gqa": enable_gqa}
    return torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, **options
    )[0]
