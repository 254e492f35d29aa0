"""A TransformerLens model by name."""

from __future__ import annotations

from typing import Any


def bridge(name: str) -> Any:
    """The TransformerBridge of a Hugging Face model, by its name or folder."""
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(name)


def hooked(name: str) -> Any:
    """The HookedTransformer of a model on TransformerLens' list, with its own weights: nothing folded or centred.

    Raises:
        ImportError: TransformerLens 4, which has no HookedTransformer.
    """
    try:
        from transformer_lens import HookedTransformer
    except ImportError as error:
        raise ImportError("TransformerLens 4 has no HookedTransformer; use TransformerBridge") from error
    return HookedTransformer.from_pretrained_no_processing(name)
