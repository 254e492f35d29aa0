"""Where the points of a block are among the modules of a Hugging Face model."""

from __future__ import annotations

from typing import Any

from torch import nn

#: point -> (path inside the block, "input" or "output")
Paths = dict[str, tuple[str, str]]

#: Llama, Mistral, Qwen, Phi-3, Gemma 1: norm, attention, add, norm, MLP, add.
LLAMA: Paths = {
    "resid_pre": ("input_layernorm", "input"),
    "resid_post": ("", "output"),
    "z": ("self_attn.o_proj", "input"),
    "attn_out": ("self_attn", "output"),
    "resid_mid": ("post_attention_layernorm", "input"),
    "mlp_post": ("mlp.down_proj", "input"),
    "mlp_out": ("mlp", "output"),
}
#: Gemma 2 and 3: each branch has a norm of its own before it is added.
GEMMA: Paths = LLAMA | {
    "attn_out": ("post_attention_layernorm", "output"),
    "resid_mid": ("pre_feedforward_layernorm", "input"),
    "mlp_out": ("post_feedforward_layernorm", "output"),
}
GPT2: Paths = {
    "resid_pre": ("ln_1", "input"),
    "resid_post": ("", "output"),
    "z": ("attn.c_proj", "input"),
    "attn_out": ("attn", "output"),
    "resid_mid": ("ln_2", "input"),
    "mlp_post": ("mlp.c_proj", "input"),
    "mlp_out": ("mlp", "output"),
}


def layers_path(base: nn.Module) -> str:
    """Name of the list of blocks in a Hugging Face base model.

    Raises:
        TypeError: neither `layers` nor `h` is there.
    """
    for name in ("layers", "h"):
        if isinstance(getattr(base, name, None), nn.ModuleList):
            return name
    raise TypeError(f"cannot find the blocks of a {type(base).__name__}: it has neither .layers nor .h")


def family_paths(block: nn.Module) -> Paths:
    """The points of a block, told from the names of its modules.

    Raises:
        TypeError: a block of an unknown layout; the message names the accessors that were looked for.
    """
    for needed, excluded, paths in (
        (("input_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"), (), GEMMA),
        (("input_layernorm", "post_attention_layernorm"), ("post_feedforward_layernorm",), LLAMA),
        (("ln_1", "ln_2"), (), GPT2),
    ):
        modules = (*needed, *(path for path, _ in paths.values() if path))
        if all(_has(block, path) for path in modules) and not any(_has(block, path) for path in excluded):
            return paths
    raise TypeError(
        f"a {type(block).__name__} has no layout that steerlens knows; it looks for the modules of Llama "
        "(self_attn.o_proj, post_attention_layernorm, mlp.down_proj), Gemma (pre_feedforward_layernorm) or GPT-2 "
        "(attn.c_proj, ln_2, mlp.c_proj)"
    )


def _has(module: Any, path: str) -> bool:
    for name in path.split("."):
        module = getattr(module, name, None)
        if not isinstance(module, nn.Module):
            return False
    return True
