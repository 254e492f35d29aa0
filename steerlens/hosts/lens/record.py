"""A record as TransformerLens keeps activations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from steerlens.core import Record


def activation_cache(record: Record, model: Any, n_layers: int) -> Any:
    """A TransformerLens `ActivationCache` that holds a record's signals under their hook names.

    Args:
        model: Where it is no TransformerLens model, the cache knows the number of layers in its place, no more: what it
            stacks over layers works, what it projects on weights does not.
    """
    from transformer_lens import ActivationCache

    if not hasattr(model, "cfg"):
        model = SimpleNamespace(cfg=SimpleNamespace(n_layers=n_layers))
    return ActivationCache(dict(record), model)
