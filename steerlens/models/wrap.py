"""A Hugging Face model and its tokenizer as the model class of a library."""

from __future__ import annotations

from typing import Any

import torch

from steerlens.models.hooked import hooked

HOSTS = ("bridge", "hooked", "nnsight", "hf")


def check_host(host: str, processed: bool) -> None:
    """Raises ValueError for an unknown host, or for processed weights where there are none."""
    if host not in HOSTS:
        raise ValueError(f"host={host!r}; it is one of {', '.join(HOSTS)}")
    if processed and host not in ("bridge", "hooked"):
        raise ValueError(f"processed=True is a mode of TransformerLens; host={host!r} always has the raw weights")


def choose_device(device: str | None) -> str:
    """The device itself; for None CUDA if there is one, else the CPU."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def wrap(host: str, name: str, model: Any, tokenizer: Any, *, processed: bool, prepend_bos: bool) -> Any:
    """Wrap a model.

    Args:
        host: `"bridge"`, `"hooked"`, `"nnsight"`, or `"hf"` for the pair (model, tokenizer) itself.
        name: What TransformerLens calls the model, as its name on the hub.
        processed: Fold norms and centre weights, as `HookedTransformer.from_pretrained` does.
        prepend_bos: What `cfg.default_prepend_bos` becomes on TransformerLens.
    """
    if host == "hf":
        return model, tokenizer
    if host == "nnsight":
        return _nnsight(model, tokenizer)
    build = _bridge if host == "bridge" else hooked
    lens = build(name, model, tokenizer, processed=processed)
    lens.cfg.default_prepend_bos = prepend_bos
    return lens.eval()


def _bridge(name: str, model: Any, tokenizer: Any, *, processed: bool) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(
        name, hf_model=model, tokenizer=tokenizer, device=str(model.device), dtype=model.dtype
    )
    if processed:
        bridge.enable_compatibility_mode(disable_warnings=True)
    return bridge


def _nnsight(model: Any, tokenizer: Any) -> Any:
    from nnsight import TransformersModel

    return TransformersModel(model, tokenizer=tokenizer, task="text-generation")
