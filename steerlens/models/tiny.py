"""A tiny model with random weights, the same on every host: what the conformance suite runs on."""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from steerlens.models.wrap import check_host, choose_device, wrap

VOCABULARY = 100
FAMILIES = ("llama", "gemma", "gpt2")


def tiny(
    family: str = "llama",
    *,
    host: str = "bridge",
    n_layers: int = 4,
    d_model: int = 32,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str | None = "cpu",
    processed: bool = False,
) -> Any:
    """A model of 4 layers and 100 tokens with random weights; no network, a fraction of a second.

    Args:
        family: `"llama"` (grouped-query attention, gated MLP), `"gemma"` (Gemma 2: norms after each branch too,
            softcaps, sliding window) or `"gpt2"` (LayerNorm, learned positions).
        host, dtype, device, processed: As for `smollm2`.
        n_layers: Number of blocks.
        d_model: Width of the residual stream, a multiple of 4.
        seed: Of the weights.

    Hosts agree to rounding: in float64 to 1e-13 for `"gpt2"`, to 1e-5 for the others, whose RMS norms and rotary angles
    transformers computes in float32 whatever the dtype.

    Raises:
        ValueError: an unknown family.

    The vocabulary is `w0 ... w96`, `<pad>`, `<bos>`, `<eos>`; no BOS is prepended.
    """
    check_host(host, processed)
    if family not in FAMILIES:
        raise ValueError(f"family={family!r}; it is one of {', '.join(FAMILIES)}")
    with tempfile.TemporaryDirectory(prefix="tiny-") as folder:
        model = _model(family, n_layers, d_model, seed).to(device=choose_device(device), dtype=dtype).eval()
        name = f"steerlens/tiny-{family}"
        return wrap(host, name, model, _tokenizer(folder), processed=processed, prepend_bos=False)


def _model(family: str, n_layers: int, d_model: int, seed: int) -> Any:
    import transformers

    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "initializer_range": 0.2,
        "pad_token_id": 97,
        "bos_token_id": 98,
    }
    common |= {"eos_token_id": 99}
    gated = common | {
        "hidden_size": d_model,
        "intermediate_size": 2 * d_model,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": d_model // 4,
        "max_position_embeddings": 128,
    }
    if family == "llama":
        kind: Any = transformers.LlamaForCausalLM
        config: Any = transformers.LlamaConfig(architectures=["LlamaForCausalLM"], **gated)
    elif family == "gemma":
        kind = transformers.Gemma2ForCausalLM
        # shorter than the suite's texts, so that the window matters
        config = transformers.Gemma2Config(
            architectures=["Gemma2ForCausalLM"], sliding_window=8, query_pre_attn_scalar=d_model // 4, **gated
        )
    else:
        kind = transformers.GPT2LMHeadModel
        config = transformers.GPT2Config(
            architectures=["GPT2LMHeadModel"], n_embd=d_model, n_layer=n_layers, n_head=4, n_positions=128, **common
        )
        config.n_ctx = 128  # HookedTransformer asks for it
    # the global generator, restored: transformers initialises from no other
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config)


def _tokenizer(folder: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{index}": index for index in range(97)} | {"<pad>": 97, "<bos>": 98, "<eos>": 99}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    # TransformerLens loads the tokenizer again by its path
    tokenizer.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)
