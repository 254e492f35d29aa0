"""A Hugging Face model in memory as a HookedTransformer, also one that TransformerLens' list of names lacks."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

# its Gemma branches write one published size each; this one's other settings hold for every Gemma of the generation
_GEMMA = {"gemma2": "google/gemma-2-2b", "gemma3_text": "google/gemma-3-270m"}


def hooked(name: str, model: Any, tokenizer: Any, *, processed: bool) -> Any:
    """Build a HookedTransformer from a model that is loaded already.

    `HookedTransformer.from_pretrained` refuses a name that is not on its list even if the model itself is given, and
    derives the architecture from words in the name. Here the configuration is read from the model.

    Args:
        name: What `cfg.model_name` becomes.
        model: A Llama, Gemma 2, Gemma 3 or GPT-2 model of transformers; the weights are copied.
        processed: Fold norms and value biases, centre what writes to the residual stream and the unembedding.

    Raises:
        ImportError: TransformerLens 4, which has no HookedTransformer.
    """
    try:
        from transformer_lens import HookedTransformer
    except ImportError as error:
        raise ImportError(
            "TransformerLens 4 has no HookedTransformer; use host='bridge', or TransformerLens 3"
        ) from error
    from transformer_lens import loading_from_pretrained as loading

    # TransformerLens reads a configuration from a folder, whose name must not hold the name of an architecture
    with tempfile.TemporaryDirectory(prefix="steerlens-") as folder:
        model.config.save_pretrained(folder)
        known = _GEMMA.get(model.config.model_type, folder)
        config = _config(loading, known, model, processed)
        config.model_name = Path(name).name
        lens = HookedTransformer(config, tokenizer, move_to_device=False)
        weights = loading.get_pretrained_state_dict(known, config, model, dtype=model.dtype)
    lens.load_and_process_state_dict(
        weights,
        fold_ln=processed,
        center_writing_weights=processed,
        # a softcap is not invariant to a shift of the logits
        center_unembed=processed and not (config.output_logits_soft_cap or 0) > 0,
        fold_value_biases=processed,
        refactor_factored_attn_matrices=False,
    )
    lens.move_model_modules_to_device()
    return lens


def _config(loading: Any, known: str, model: Any, processed: bool) -> Any:
    config = loading.get_pretrained_model_config(
        known, hf_cfg=model.config.to_dict(), fold_ln=processed, device=str(model.device), dtype=model.dtype
    )
    if known not in _GEMMA.values():
        return config
    theirs = model.config
    size = {
        "d_model": theirs.hidden_size,
        "n_layers": theirs.num_hidden_layers,
        "d_mlp": theirs.intermediate_size,
        "n_heads": theirs.num_attention_heads,
        "n_key_value_heads": theirs.num_key_value_heads,
        "d_head": theirs.head_dim,
        "rotary_dim": theirs.head_dim,
        "n_ctx": min(config.n_ctx, theirs.max_position_embeddings),
        "eps": theirs.rms_norm_eps,
        "window_size": theirs.sliding_window,
        "attn_types": ["local" if kind == "sliding_attention" else "global" for kind in theirs.layer_types],
        "attn_scale": math.sqrt(theirs.query_pre_attn_scalar),
        # -1 is TransformerLens' word for no softcap
        "attn_scores_soft_cap": theirs.attn_logit_softcapping or -1.0,
        "output_logits_soft_cap": theirs.final_logit_softcapping or -1.0,
    }
    return type(config).from_dict(config.to_dict() | size)
