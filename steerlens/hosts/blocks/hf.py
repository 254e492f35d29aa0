"""What TransformerBridge and nnsight share: a Hugging Face model underneath, its call arguments and its KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steerlens.hosts.blocks.context import FixedContext
from steerlens.hosts.blocks.nominal import Capture, Nominal
from steerlens.hosts.blocks.turns import turn_of


def call_shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a call of a Hugging Face base model says of its pass: the shape of its tokens, mask and cache.

    `past` is a tensor if the cache is a static one.
    """
    tokens = kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    if tokens is None:
        tokens = args[0]
    mask = kwargs.get("attention_mask")
    if mask is None and len(args) > 1 and isinstance(args[1], Tensor):
        mask = args[1]
    cache = kwargs.get("past_key_values")
    past = cache.get_seq_length() if cache is not None else 0
    return {
        "shape": (tokens.shape[0], tokens.shape[1]),
        "past": past if isinstance(past, Tensor) else int(past),
        "mask": plain_mask(mask),
        "device": tokens.device,
        "cache": cache,
        "tokens": tokens,
    }


def plain_mask(mask: Any) -> Tensor | None:
    """Which columns hold real tokens, `[batch pos]`, in the mask that a model is given.

    A static cache needs masks of four dimensions, one for each kind of attention: there the last query sees every real
    token, except through a sliding window.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None or mask.ndim == 2:
        return mask
    if mask.ndim != 4:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; steering needs [batch pos]")
    row = mask[:, 0, -1]
    return row if row.dtype == torch.bool else row == 0


def prompt_end(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """First column after the prompt of a call of transformers' `generate`; None: it does not say.

    With a cache that holds the beginning of the text, `generate` takes either the whole text or what is new of it, and
    tells them apart by the length of the mask; so does this.
    """
    given = [args[0] if args else None, *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))]
    found = [value for value in given if isinstance(value, Tensor) and value.ndim > 1 and value.shape[1]]
    if not found:
        return None
    length = max(value.shape[1] for value in found)
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    past = 0 if cache is None else int(cache.get_seq_length())
    if not past or mask is None or mask.shape[1] == length:
        return length
    return past + length


class FrozenCache:
    """Stands in for a layer's KV cache during a replay: gives the past to the new token and keeps nothing."""

    def __init__(self, keys: Tensor, values: Tensor):
        self._past = (keys, values)

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Past and new keys and values, `[n head pos d_head]`."""
        return FixedContext.join(self._past[0], keys, 2), FixedContext.join(self._past[1], values, 2)

    def get_seq_length(self, *_: Any) -> int:
        """Number of past tokens."""
        return self._past[0].shape[2]


def nominal(base: nn.Module, blocks: Sequence[nn.Module], tokens: Sequence[int]) -> Nominal:
    """The last token's path through the blocks of a Hugging Face base model.

    Not of the whole model: logits of all tokens would take more memory than the gains.
    """
    require_context(tokens)
    device = next(blocks[0].parameters()).device
    ids = torch.as_tensor(tokens, device=device)[None]
    with turn_of(blocks[0]), torch.inference_mode(False), torch.no_grad():
        cache = base(input_ids=ids[:, :-1], use_cache=True).past_key_values
        # the tensors before the last token; appending makes new ones
        past = [(layer.keys, layer.values) for layer in cache.layers]
        with Capture(blocks) as capture:
            base(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)

    def freeze(layer: int, value: Any) -> Any:
        return FrozenCache(*past[layer]) if value is cache else value

    return capture.nominal(freeze)


def require_context(tokens: Sequence[int]) -> None:
    """Raises ValueError for a text too short to have a last token and a context."""
    if len(tokens) < 2:
        raise ValueError(f"linearisation needs a text of at least 2 tokens, it got {len(tokens)}")
