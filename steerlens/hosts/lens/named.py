"""A TransformerLens model by name."""

from __future__ import annotations

from typing import Any


def bridge(name: str) -> Any:
    """The TransformerBridge of a Hugging Face model, by its name or folder."""
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(name)
