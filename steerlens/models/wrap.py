"""A Hugging Face model and its tokenizer as the model class of a library."""

from __future__ import annotations

from typing import Any

HOSTS = ("bridge", "hooked", "nnsight", "hf")


def check_host(host: str, processed: bool) -> None:
    """Raises ValueError for an unknown host, or for processed weights where there are none."""
    if host not in HOSTS:
        raise ValueError(f"host={host!r}; it is one of {', '.join(HOSTS)}")
    if processed and host not in ("bridge", "hooked"):
        raise ValueError(f"processed=True is a mode of TransformerLens; host={host!r} always has the raw weights")


def wrap(host: str, folder: str, model: Any, tokenizer: Any, *, processed: bool, prepend_bos: bool) -> Any:
    """Wrap a model.

    Args:
        host: `"bridge"`, `"hooked"`, `"nnsight"`, or `"hf"` for the pair (model, tokenizer) itself.
        folder: Where the model's configuration lies. HookedTransformer tells the architecture from this name, so it
            must contain neither "llama" nor "gemma" for a model that is not one of Meta's or Google's own.
        processed: Fold norms and centre weights, as `HookedTransformer.from_pretrained` does.
        prepend_bos: What `cfg.default_prepend_bos` becomes on TransformerLens.
    """
    if host == "hf":
        return model, tokenizer
    if host == "nnsight":
        return _nnsight(model, tokenizer)
    lens = (
        _bridge(folder, model, tokenizer, processed)
        if host == "bridge"
        else _hooked(folder, model, tokenizer, processed)
    )
    lens.cfg.default_prepend_bos = prepend_bos
    return lens.eval()


def _bridge(folder: str, model: Any, tokenizer: Any, processed: bool) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(
        folder, hf_model=model, tokenizer=tokenizer, device=str(model.device), dtype=model.dtype
    )
    if processed:
        bridge.enable_compatibility_mode(disable_warnings=True)
    return bridge


def _hooked(folder: str, model: Any, tokenizer: Any, processed: bool) -> Any:
    try:
        from transformer_lens import HookedTransformer
    except ImportError as error:
        raise ImportError(
            "TransformerLens 4 has no HookedTransformer; use host='bridge', or TransformerLens 3"
        ) from error
    from transformer_lens import loading_from_pretrained as loading

    load = HookedTransformer.from_pretrained if processed else HookedTransformer.from_pretrained_no_processing
    known = loading.OFFICIAL_MODEL_NAMES
    # a name that is not on this list is refused, also where the model itself is given
    added = folder not in known
    if added:
        known.append(folder)
    try:
        return load(folder, hf_model=model, tokenizer=tokenizer, device=str(model.device), dtype=model.dtype)
    finally:
        if added:
            known.remove(folder)


def _nnsight(model: Any, tokenizer: Any) -> Any:
    from nnsight import TransformersModel

    return TransformersModel(model, tokenizer=tokenizer, task="text-generation")
