"""TransformerLens's own calls: its generation, what it saves in a cache, which tokens it takes for pads."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformer_lens.utilities import Slice, get_attention_mask

from steerlens.hosts.caches import Generation
from steerlens.hosts.steered import Steered


def generate(steered: Steered, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """TransformerLens's own loop: its first pass is the whole prompt."""
    with steered.generating(Generation()):
        return inner(*args, **kwargs)


def embed(steered: Steered, inner: Callable[..., Any], tokens: Any) -> Any:
    """Around HookedTransformer's token embedding, to which `generate` gives each token before its pass."""
    generation = steered.generation if any(each.run.reads_tokens for each in steered.attached) else None
    if generation is not None and not steered.inside and isinstance(tokens, Tensor):
        before = generation.embedded
        generation.embedded = tokens if before is None else torch.cat([before, tokens.to(before)], dim=1)
    return inner(tokens)


def ids_of(steered: Steered, embeddings: Tensor) -> Tensor:
    """The ids of embeddings that come in: the latest that `generate` has embedded; elsewhere they are not known."""
    ids = None if steered.generation is None else steered.generation.embedded
    return embeddings if ids is None else ids[:, -embeddings.shape[1] :]


def caching(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """HookedTransformer counts the axis of positions from the end, where a signal of one number a token has none.

    Upstream: TransformerLens's hook points do not know their axes; goes when they do, or with HookedTransformer.
    """
    given = inspect.signature(inner).bind(*args, **kwargs)
    given.apply_defaults()
    options = given.arguments
    cache, forward, backward = inner(*args, **kwargs)
    part = Slice.unwrap(options["pos_slice"])

    def save(tensor: Tensor, hook: Any, ending: str = "") -> None:
        value = part.apply(tensor.detach().to(options["device"]), dim=1)
        cache[hook.name + ending] = value[0] if options["remove_batch_dim"] else value

    def ours(hooks: list[Any], ending: str) -> list[Any]:
        return [(name, partial(save, ending=ending) if ".hook_steer_" in name else hook) for name, hook in hooks]

    return cache, ours(forward, ""), ours(backward, "_grad")


def padding_mask(tokenizer: Any, tokens: Tensor, prepends_bos: bool, side: str) -> Tensor:
    """Real tokens of a padded batch, as TransformerLens itself tells them from pads."""
    mask = get_attention_mask(tokenizer, tokens, prepends_bos, padding_side=side)
    if side == "right" and prepends_bos and tokenizer.bos_token_id == tokenizer.pad_token_id:
        mask[:, 0] = 1  # an empty text is its BOS
    return mask


def folded(cfg: Any) -> bool:
    """Whether norm weights were folded into the matrices after them."""
    return str(getattr(cfg, "normalization_type", "")).endswith("Pre")


def refuse_empty_slots(config: Any, mask: Any) -> None:
    """Raises NotImplementedError unless the mask of a pass with a static cache tells its empty slots from tokens.

    Upstream: TransformerLens 3.9's Bridge attends to every slot without a mask, which transformers leaves out if no row
    has a pad. TransformerLens 4 is right; goes with TransformerLens 3.
    """
    unknown = mask is None or (isinstance(mask, Tensor) and mask.ndim == 2 and bool(mask.all()))
    if unknown and config._attn_implementation != "eager":
        raise NotImplementedError(
            "TransformerBridge of TransformerLens 3 attends to the empty slots of a static cache if no row has a pad, "
            "steered or not; leave cache_implementation='static' out, load the model with "
            "attn_implementation='eager', or use TransformerLens 4"
        )
