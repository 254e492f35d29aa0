"""Where the points of a block are among the modules of a Hugging Face model; travels to servers.

Block classes that transformers has are in `layouts.LAYOUTS`. What it does not know keeps `resid_pre` and `resid_post`,
which are a block's own input and output, until the user names the rest with `steerlens.roles`.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from steerlens.hosts.layouts import LAYOUTS
from steerlens.hosts.types import Model
from steerlens.hosts.weights import matrix_of, unwrapped

#: By the name of a model's class: path of its blocks. By that of a block's: its entry. What the user has declared.
BLOCKS: dict[str, str] = {}
DECLARED: dict[str, dict[str, Any]] = {}

#: Points that every block has.
ENDS = ("resid_pre", "resid_post")
#: Why a bidirectional model cannot be steered.
BOTH_WAYS = "its tokens see those behind them, and pads"
_SIDES = {"z": "input", "mlp_post": "input", "attn_out": "output", "mlp_out": "output"}
_NAME = "wrap one with TransformersModel, or name them with steerlens.roles(model, blocks='...')"
_TOWER = re.compile(r"vision|visual|image|audio|speech|video|tower|expert")


class Layout:
    """The points of one block.

    An entry of the table gives for each of `attn_out`, `mlp_out` (outputs of a module), `z`, `mlp_post` (inputs of an
    output matrix), `mid` (what reads the stream between the branches) and `norm` (what reads it before the first) the
    paths at which it may be, of which the first that the block has counts. Beside them: `parallel`, both branches read
    the block's input, so there is nothing between them; `scale`, the attribute by which a branch is multiplied before
    it is added; `behind`, norms stand behind the additions; `sum`, why the branches are not all that a block adds;
    `refuse`, why it cannot be steered. A list in place of True names attributes of the configuration, any of which
    makes it so, or with `!` its absence.

    Args:
        block: The block, of which TransformerBridge may have wrapped the modules.
        config: The text model's configuration.

    Attributes:
        kind: Name of the block's class.
        known: The table, or the user, knows it.
        paths: By point: path inside the block, and whether it is that module's `"input"` or `"output"`.
        norm: Path of what reads the block's input first, or None.
        scale: Factor on what a branch puts out.
        parallel: Both branches read the block's input.
        unsummed: Why `resid_pre + attn_out + mlp_out` is not `resid_post`; None where it is.
        widths: Of `z` (all heads together) and `mlp_post`, from the matrix that reads it.
    """

    def __init__(self, block: Any, config: Any):
        block = unwrapped(block)
        self.kind = type(block).__name__
        found = entry_of(block)
        self.known = found is not None
        entry = found or {}
        self.refused = entry.get("refuse") or (BOTH_WAYS if _sees_behind(block) else None)
        self.parallel = _holds(entry.get("parallel"), config)
        behind = _holds(entry.get("behind"), config)
        self.unsummed = "its norms come after the additions" if behind else entry.get("sum")
        scale = entry.get("scale")
        self.scale = float(entry.get("factor") or (scale and getattr(config, scale, None)) or 1.0)
        self.paths: dict[str, tuple[str, str]] = {"resid_pre": ("", "input"), "resid_post": ("", "output")}
        for point, side in _SIDES.items():
            path = _present(block, entry.get(point, ()))
            if path is not None and not (point == "mlp_post" and _has_experts(block)):
                self.paths[point] = (path, side)
        mid = None if self.parallel or behind else _present(block, entry.get("mid", ()))
        if mid is not None and "attn_out" in self.paths:
            self.paths["resid_mid"] = (mid, "input")
        self.norm = None if behind else _present(block, entry.get("norm", ()))
        # numbers and names only: an instance may travel, a block's weights may not
        self.mixture = any("expert" in name or "moe" in name for name, _ in block.named_modules())
        inputs = [point for point in self.paths if _SIDES.get(point) == "input"]
        self.widths = {point: input_width(submodule(block, self.paths[point][0])) for point in inputs}

    def check(self, model: str) -> None:
        """Raises TypeError for a block that cannot be steered, of a model of the given name."""
        if self.refused is not None:
            raise TypeError(f"cannot steer a {model}: {self.refused}")

    def missing(self, point: str) -> str | None:
        """Why the block has no such point, as the end of a sentence; None where it has it."""
        if point in self.paths:
            return None
        if not self.known:
            return f"is a {self.kind}, whose {point} steerlens does not know; name it with steerlens.roles(model, ...)"
        if point == "resid_mid" and self.parallel:
            return "runs attention and MLP in parallel and has no resid_mid"
        if point == "mlp_post" and self.mixture:
            return "is a mixture of experts and has no mlp_post"
        return f"is a {self.kind} and has no {point}"


def output_matrix(block: Any, layout: Layout) -> Any:
    """A matrix by which a block can be told: the MLP's output, else attention's; None unless in floating point."""
    for point in ("mlp_post", "z"):
        if point in layout.paths:
            weight = matrix_of(submodule(block, layout.paths[point][0]))
            if isinstance(weight, Tensor) and weight.is_floating_point() and weight.ndim == 2:
                return weight
    return None


def input_width(matrix: Any) -> int | None:
    """Length of what an output matrix reads; None where it does not tell."""
    for name in ("in_features", "nx"):
        if isinstance(getattr(matrix, name, None), int):
            return int(getattr(matrix, name))
    weight = getattr(matrix, "weight", None)
    if weight is None or getattr(weight, "ndim", 0) != 2:
        return None
    # GPT-2's Conv1D keeps [in out]
    return int(weight.shape[0] if type(matrix).__name__ == "Conv1D" else weight.shape[1])


def roles(
    model: Model,
    *,
    blocks: str | None = None,
    attn_out: str | None = None,
    mlp_out: str | None = None,
    z: str | None = None,
    mlp_post: str | None = None,
    resid_mid: str | None = None,
    parallel: bool = False,
    scale: float = 1.0,
) -> None:
    """Name the modules of a model that steerlens does not know; it holds for all models of the same classes.

        steerlens.roles(model, blocks="model.layers", attn_out="self_attn", mlp_out="mlp", resid_mid="norm2")

    Args:
        model: An nnsight, TransformerLens or Hugging Face model.
        blocks: Path of the list of blocks in the Hugging Face model.
        attn_out, mlp_out: Path inside a block of the module whose output is added to the residual stream.
        z, mlp_post: Path inside a block of the matrix whose input is the heads' output, or the neurons.
        resid_mid: Path inside a block of the module that reads the stream between the branches.
        parallel: Both branches read the block's input.
        scale: Factor on what a branch puts out.

    Raises:
        ValueError: a path that is not there.
    """
    inner = torch_model(model)
    if blocks is not None:
        if not isinstance(submodule(inner, blocks), nn.ModuleList):
            raise ValueError(f"blocks={blocks!r} is no list of modules in a {type(inner).__name__}")
        BLOCKS[type(inner).__name__] = blocks
    first = unwrapped(skeleton(inner)[2][0])
    given = {"attn_out": attn_out, "mlp_out": mlp_out, "z": z, "mlp_post": mlp_post, "mid": resid_mid}
    named = {point: path for point, path in given.items() if path is not None}
    for point, path in named.items():
        if submodule(first, path) is None:
            raise ValueError(f"{point}={path!r}: a {type(first).__name__} has no module of that path")
    if named or parallel or scale != 1.0:
        entry: dict[str, Any] = {point: [path] for point, path in named.items()}
        DECLARED[type(first).__name__] = entry | {"parallel": parallel, "factor": scale}


def skeleton(model: nn.Module) -> tuple[str, str, Any, Any]:
    """Path of a Hugging Face model's watched module, path of its blocks, the blocks, and the text configuration.

    The watched module runs once in each forward pass and is given mask and KV cache: the base model, or its decoder
    where the head calls that directly.

    Raises:
        TypeError: no language model with a head, one that is not causal, or one whose blocks cannot be found.
    """
    inner: Any = model
    prefix = ""
    if hasattr(inner, "get_base_model"):  # PEFT
        _refuse_virtual_tokens(inner)
        inner = inner.get_base_model()
        prefix = _path_of(model, inner)
    kind, config = type(inner).__name__, getattr(inner, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise TypeError(f"{kind} is no Hugging Face language model; wrap one with TransformersModel")
    refuse_other_kinds(kind, config)
    text = config.get_text_config()
    within = BLOCKS.get(kind) or _find_blocks(inner, text.num_hidden_layers)
    # Llama 4 tells a prefix that it does not have
    base = inner.base_model_prefix if hasattr(inner, inner.base_model_prefix or "?") else within.partition(".")[0]
    if not within.startswith(base + "."):
        raise TypeError(f"{kind} is no language model with a head, or has blocks that steerlens does not find; {_NAME}")
    start, path = _join(prefix, base), _join(prefix, within)
    blocks = submodule(model, path)
    if not isinstance(blocks, nn.ModuleList):
        raise TypeError(f"steerlens does not find the blocks of a {kind}; {_NAME}")
    Layout(blocks[0], text).check(kind)
    watched = _join(start, "decoder")
    return (watched if path.startswith(watched + ".") else start), path, blocks, text


def refuse_other_kinds(kind: str, config: Any) -> None:
    """Raises TypeError for a model that does not go from left to right through one stack of blocks."""
    if getattr(config, "is_encoder_decoder", False):
        raise TypeError(f"cannot steer a {kind}: it has an encoder and a decoder, steerlens knows one stack of blocks")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    # "vision": images only
    if "MaskedLM" in kind or getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        raise TypeError(f"cannot steer a {kind}: it is bidirectional, {BOTH_WAYS}")


def _refuse_virtual_tokens(model: Any) -> None:
    """Raises TypeError for a model of PEFT that puts tokens of its own in front of a text."""
    for name in _names(getattr(model, "active_adapter", None)):
        if getattr(model.peft_config[name], "is_prompt_learning", False):
            raise TypeError(
                f"cannot steer a {type(model).__name__} with {type(model.peft_config[name]).__name__}: it puts virtual "
                "tokens in front of each text, so that positions are no longer those of the text"
            )


def _names(value: Any) -> list[str]:
    if callable(value):  # of transformers' own integration
        value = value()
    return [value] if isinstance(value, str) else list(value or ())


def entry_of(block: Any) -> dict[str, Any] | None:
    """The table's entry for a block, the user's before ours; None where there is none."""
    name = type(block).__name__
    if name in DECLARED:
        return DECLARED[name]
    if not type(block).__module__.startswith("transformers."):
        return None  # the name may be anybody's
    return next((entry for names, entry in LAYOUTS if name in names.split()), None)


def submodule(module: Any, path: str) -> Any:
    """A module by its path, through TransformerBridge's wrappers; None where it is not there."""
    for name in path.split(".") if path else ():
        inner = module._modules.get(name)
        if inner is None and isinstance(module, nn.Module):
            inner = unwrapped(module)._modules.get(name)
        if inner is None:
            return None
        module = inner
    return module


def _holds(condition: Any, config: Any) -> bool:
    if not isinstance(condition, list):
        return bool(condition)
    return any(bool(getattr(config, name.lstrip("!"), False)) != name.startswith("!") for name in condition)


def _present(block: Any, paths: Any) -> str | None:
    return next((path for path in paths if submodule(block, path) is not None), None)


def _sees_behind(block: Any) -> bool:
    """Whether attention says of itself that no part of it is causal, as in encoders and models of embeddings."""
    said = [getattr(part, "is_causal", None) for part in block.modules()]
    return False in said and True not in said


def _has_experts(block: Any) -> bool:
    """Whether experts stand beside the MLP."""
    return any(name in block._modules for name in ("experts", "block_sparse_moe"))


def _find_blocks(model: nn.Module, n_layers: int) -> str:
    """The shallowest list of as many modules as the text model has layers, outside of towers for other inputs."""
    found = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers and not _TOWER.search(path)
    ]
    return min(found, key=lambda path: path.count("."), default="?")


def _path_of(model: nn.Module, inner: nn.Module) -> str:
    return next(path for path, module in model.named_modules() if module is inner)


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def torch_model(model: Model) -> nn.Module:
    """The Hugging Face model in what a host library has made of it."""
    inner = getattr(model, "_module", None) or getattr(model, "original_model", None) or model
    if not isinstance(inner, nn.Module):
        raise TypeError(f"this needs a model that has modules of Hugging Face, it got a {type(model).__name__}")
    return inner
