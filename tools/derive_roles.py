"""Write `steerlens/hosts/layouts.py`: where the points of blocks are, taken from TransformerLens's adapters.

    python tools/derive_roles.py            # writes the table
    python tools/derive_roles.py --check    # fails if the table differs

An adapter is made for each architecture of TransformerLens that transformers has a class for, from its default
configuration, and the model on the meta device, for the names of its block classes. No weights, no network. What an
adapter cannot give stands below, each line with its reason. The table is Python, not JSON, because it travels: a
server that steers from inside a block has no files of ours.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parents[1] / "steerlens" / "hosts" / "layouts.py"

#: Configurations whose defaults are incomplete.
CONFIGS: dict[str, dict[str, Any]] = {
    "NemotronForCausalLM": {"num_key_value_heads": 8},
    "HunYuanDenseV1ForCausalLM": {"head_dim": 128},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"] * 16},
}
#: Block class -> (block class with the same layout, reason).
SAME: dict[str, tuple[str, str]] = {
    "Qwen2_5_VLDecoderLayer": ("Qwen2DecoderLayer", "its adapter asks for torchvision, which only images need"),
    "Qwen2VLDecoderLayer": ("Qwen2DecoderLayer", "as Qwen 2.5 VL"),
    "Qwen3VLTextDecoderLayer": ("Qwen3DecoderLayer", "its adapter asks for torchvision, which only images need"),
    "Qwen3VLMoeTextDecoderLayer": ("Qwen3MoeDecoderLayer", "its adapter asks for torchvision, which only images need"),
    "HeliumDecoderLayer": ("LlamaDecoderLayer", "no adapter; its block is Llama's"),
}
BOTH_WAYS = "its tokens see those behind them, and pads"
#: Block class -> changes of what its adapter gives; None takes a role away.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    # the choice is the configuration's, and an adapter knows the one that it was made for
    "GPTNeoXLayer": {"parallel": ["use_parallel_residual"], "mid": ["post_attention_layernorm"]},
    "StableLmDecoderLayer": {"parallel": ["use_parallel_residual"]},
    "FalconDecoderLayer": {
        "parallel": ["parallel_attn", "new_decoder_architecture"],
        "mid": ["post_attention_layernorm"],
        "norm": ["ln_attn", "input_layernorm"],
    },
    # with do_layer_norm_before=False the norms stand behind the additions
    "OPTDecoderLayer": {"behind": ["!do_layer_norm_before"]},
    "Block": {"behind": True, "norm": None},
    # what is added beside the two branches: the per-layer input, and a factor on the whole
    "Gemma4TextDecoderLayer": {"sum": "a per-layer input is added, and the sum is scaled"},
    "Gemma4UnifiedTextDecoderLayer": {"sum": "the sum is scaled"},
    # attention and Mamba read one state and their sum is added: neither is the branch
    "FalconH1DecoderLayer": {"attn_out": None, "mid": None, "sum": "attention and Mamba are one branch"},
    # its hooks are set when a block is bound, which needs weights
    "OlmoHybridAttentionDecoderLayer": {"attn_out": ["post_attention_layernorm"], "mid": ["mlp"]},
    "OlmoHybridLinearAttentionDecoderLayer": {"mlp_out": ["mlp"], "mid": ["post_attention_layernorm"]},
    # the only branch of these blocks is no attention
    "MambaBlock": {"attn_out": None},
    "Mamba2Block": {"attn_out": None},
    "FalconMambaBlock": {"attn_out": None},
    "NemotronHBlock": {"attn_out": None},
    "Zamba2MambaDecoderLayer": {"attn_out": None},
    "RwkvBlock": {"mid": None, "norm": None},
    "BertLayer": {"refuse": BOTH_WAYS},
    "ModernBertEncoderLayer": {"refuse": BOTH_WAYS},
    "RobertaLayer": {"refuse": BOTH_WAYS},
    "HubertEncoderLayer": {"refuse": BOTH_WAYS},
    "ViTLayer": {"refuse": BOTH_WAYS},
    "DeiTLayer": {"refuse": BOTH_WAYS},
    "DeepseekV4DecoderLayer": {"refuse": "its residual stream has several streams side by side"},
    "Gemma3nTextDecoderLayer": {"refuse": "its residual stream has several streams side by side"},
}


def main() -> None:
    """Write or check the table."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    table, left_out = derive()
    for architecture, reason in sorted(left_out.items()):
        print(f"left out: {architecture}: {reason}", file=sys.stderr)
    print(f"{len(table)} kinds of blocks", file=sys.stderr)
    text = written(table)
    if "--check" not in sys.argv:
        TABLE.write_text(text)
    elif TABLE.read_text() != text:
        sys.exit(f"{TABLE} differs from what the adapters say; run {Path(__file__).name}")


def derive() -> tuple[dict[str, Any], dict[str, str]]:
    """The table by block class, and the architectures that gave nothing, with the reason."""
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    table: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for architecture in sorted(SUPPORTED_ARCHITECTURES):
        try:
            bridge, kinds = adapted(architecture)
        except Exception as error:
            left_out[architecture] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        for kind in kinds:
            table.setdefault(kind, roles(bridge))
    for name, (other, _) in SAME.items():
        table[name] = table[other]
    for name, changes in EXCEPTIONS.items():
        entry = {key: value for key, value in (table.get(name, {}) | changes).items() if value}
        table[name] = {"refuse": entry["refuse"]} if "refuse" in entry else entry
    return table, left_out


def written(table: dict[str, Any]) -> str:
    """The table as a module, block classes of one layout together."""
    layouts: dict[str, list[str]] = {}
    for name, entry in sorted(table.items()):
        layouts.setdefault(repr(dict(sorted(entry.items()))), []).append(name)
    lines = [
        '"""Where the points of each kind of block are. Written by tools/derive_roles.py; change that, not this."""',
        "",
        "from __future__ import annotations",
        "",
        "from typing import Any",
        "",
        "# fmt: off",
        "#: Block classes of transformers, and their common layout; `roles.Layout` explains the entries.",
        "LAYOUTS: list[tuple[str, dict[str, Any]]] = [",
    ]
    for entry, names in layouts.items():
        lines += ["    (", *_wrapped(names), f"        {entry},".replace("'", '"'), "    ),"]
    return "\n".join([*lines, "]", "# fmt: on", ""])


def _wrapped(names: list[str]) -> list[str]:
    lines, line = [], ""
    for name in names:
        if len(line) + len(name) > 100:
            lines.append(line)
            line = ""
        line += name + " "
    parts = [f'        "{part}"' for part in [*lines, line.rstrip()]]
    return [*parts[:-1], parts[-1] + ","]


def adapted(architecture: str) -> tuple[Any, set[str]]:
    """The adapter's component for the blocks, and the names of their classes."""
    import torch
    import transformers
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory

    kind = getattr(transformers, architecture, None)
    if kind is None:
        raise LookupError("transformers has no such class")
    config = kind.config_class(**CONFIGS.get(architecture, {}))
    config.architectures = [architecture]
    if config.is_encoder_decoder:
        raise LookupError("encoder and decoder")
    adapter = ArchitectureAdapterFactory.select_architecture_adapter(bridge_config(config, architecture))
    bridge = adapter.component_mapping.get("blocks")
    if bridge is None:
        raise LookupError("its adapter has no list of blocks")
    with torch.device("meta"):
        model = kind(config)
    return bridge, {type(block).__name__ for block in model.get_submodule(bridge.name)}


def bridge_config(config: Any, architecture: str) -> Any:
    """What `TransformerBridge.boot_transformers` makes of a Hugging Face configuration."""
    import torch
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge.sources._bridge_builder import _HF_PASSTHROUGH_ATTRS
    from transformer_lens.model_bridge.sources.transformers import map_default_transformer_lens_config

    mapped = dict(map_default_transformer_lens_config(config).__dict__)
    if "num_local_experts" in mapped:
        mapped.setdefault("num_experts", mapped["num_local_experts"])
    made = TransformerBridgeConfig.from_dict(mapped)
    made.architecture, made.model_name, made.dtype = architecture, architecture, torch.float32
    text = config.get_text_config()
    for name in _HF_PASSTHROUGH_ATTRS:
        try:
            value = getattr(text, name, None)
        except Exception:  # an attribute that differs by layer
            continue
        if value is not None:
            setattr(made, name, value)
    return made


#: Names of an MLP's output matrix in the adapters; the second is that of a dense block in a stack with experts.
OUT = ("out", "dense_out")
#: What stands in attention's place in other blocks of a stack.
INSTEAD = ("linear_attn", "mamba", "mixer", "ssm", "conv")


def roles(bridge: Any) -> dict[str, Any]:
    """The entry of a class of blocks; paths that only blocks of another configuration have are among it."""
    from transformer_lens.model_bridge.generalized_components import ParallelBlockBridge, ScaledResidualBlockBridge

    parts, aliases = bridge.submodules or {}, bridge.hook_aliases or {}

    def located(hook: str) -> list[str]:
        """Path of the module whose output, or input, a hook of the block is."""
        path, part = [], bridge
        for name in hook.split(".")[:-1]:
            part = (part.submodules or {}).get(name)
            if part is None:
                return []
            path.append(part.name)
        return [".".join(step for step in path if step)] if path else []

    def within(name: str, inner: tuple[str, ...]) -> list[str]:
        found = getattr(parts.get(name), "submodules", None) or {}
        return [".".join(filter(None, (parts[name].name, found[key].name))) for key in inner if key in found]

    scaled = isinstance(bridge, ScaledResidualBlockBridge)
    attn = located(aliases.get("hook_attn_out", "attn.hook_out" if scaled else ""))
    attn += [part.name for name, part in parts.items() if name in INSTEAD]
    mlp = located(aliases.get("hook_mlp_out", "mlp.hook_out" if hasattr(bridge, "hook_mlp_out") else ""))
    entry = {
        "attn_out": attn,
        "mlp_out": mlp,
        "z": within("attn", ("o",)),
        "mlp_post": within("mlp", OUT),
        # a norm that closes a branch is not what the stream enters
        "norm": [path for path in located("ln1.hook_in") if path not in (*attn, *mlp)],
        "mid": [path for path in located(aliases.get("hook_resid_mid", "")) if path not in (*attn, *mlp)],
        "parallel": isinstance(bridge, ParallelBlockBridge),
        "scale": "residual_multiplier" if scaled else None,
    }
    return {key: value for key, value in entry.items() if value}


if __name__ == "__main__":
    main()
