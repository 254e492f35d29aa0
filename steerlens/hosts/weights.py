"""How a model keeps its weights: with adapters of PEFT, in fewer bits, or elsewhere until they are used; travels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_QUANTISED = ("torch.ao.nn.quantized", "bitsandbytes", "torchao", "optimum.quanto", "hqq", "auto_gptq", "awq")


def unwrapped(module: Any) -> Any:
    """What TransformerBridge has wrapped."""
    while isinstance(getattr(module, "original_component", None), nn.Module):
        module = module.original_component
    return module


def matrix_of(module: Any) -> Any:
    """The matrix that a linear map applies, as it stores it, `[out in]`, or `[in out]` for GPT-2's Conv1D.

    With an adapter of PEFT that is not merged it is what the map does to unit vectors, whatever kind of adapter it is.
    """
    module = unwrapped(module)
    weight = getattr(module, "weight", None)
    if weight is None or not adapts(module) or not weight.is_floating_point() or weight.ndim != 2:
        return weight
    swapped = sides_swapped(module)
    units = torch.eye(weight.shape[0 if swapped else 1], dtype=weight.dtype, device=weight.device)
    with torch.inference_mode(False), torch.no_grad():
        rows = module(units) - module(torch.zeros_like(units[:1]))
    return rows if swapped else rows.T


def sides_swapped(matrix: Any) -> bool:
    """Whether a linear map keeps `[in out]`, as GPT-2's Conv1D does, and not `[out in]`."""
    matrix = unwrapped(matrix)
    while hasattr(matrix, "base_layer"):
        matrix = matrix.base_layer
    return type(matrix).__name__ == "Conv1D"


def adapter_of(blocks: Iterable[Any]) -> list[float]:
    """A few numbers of the adapter of PEFT at work in some blocks, the same on every host; empty if there is none.

    A merged adapter is part of the weights, and one that is switched off does nothing.
    """
    found: dict[int, float] = {}
    for block in blocks:
        for module in block.modules():
            for value in _parts(module) if adapts(module) else ():
                if value.numel():
                    found[id(value)] = round(float(value.detach().flatten()[0]), 6)
        if found:
            break
    # sorted, because TransformerBridge has its modules in another order
    return sorted(found.values())[:8]


def held_apart(blocks: Iterable[Any]) -> str | None:
    """Why the parameters of some blocks are not those of one plain model, a sentence; None where they are."""
    for block in blocks:
        for module in block.modules():
            if getattr(module, "adapter_layer_names", None):
                return (
                    "the parameters of this model are its weights and an adapter of PEFT beside them, for which a "
                    "gradient step is another one; merge the adapter first: model = model.merge_and_unload()"
                )
            if any(getattr(hook, "offload", False) for hook in _hooks(module)):
                return (
                    "accelerate keeps the parameters of this model elsewhere until a module runs, so that there is "
                    "nothing to differentiate; load the model without offloading"
                )
    return None


def is_quantised(model: Any) -> bool:
    """Whether a Hugging Face model, or PyTorch, keeps its matrices in fewer bits."""
    if getattr(getattr(model, "config", None), "quantization_config", None) or getattr(model, "is_quantized", False):
        return True
    if any(type(part).__module__.startswith(_QUANTISED) for part in model.modules()):
        return True
    return any(
        (not value.is_floating_point() and value.ndim > 1) or type(value.data).__module__.startswith(_QUANTISED)
        for value in model.parameters()
    )


def device_of(block: Any) -> torch.device:
    """Where a block computes: where its weights are, or where accelerate takes them; "meta" if they are on a server."""
    device = next(block.parameters()).device
    if device.type != "meta":
        return device
    for module in block.modules():
        for hook in _hooks(module):
            if getattr(hook, "execution_device", None) is not None:
                return torch.device(hook.execution_device)
    return device


def dtype_of(block: Any) -> torch.dtype:
    """In what a block computes: the dtype of the first of its weights in floating point."""
    floats = (value.dtype for value in block.parameters() if value.is_floating_point())
    return next(floats, torch.get_default_dtype())


def adapts(module: Any) -> bool:
    """Whether an adapter of PEFT changes what a linear map does, and is not part of its weights."""
    module = unwrapped(module)
    if not getattr(module, "adapter_layer_names", None) or getattr(module, "base_layer", None) is None:
        return False
    return not module.merged and not module.disable_adapters and bool(_parts(module))


def _parts(module: Any) -> list[Tensor]:
    """The parameters of the active adapters of a module of PEFT."""
    found: list[Tensor] = []
    for kind in module.adapter_layer_names:
        held = getattr(module, kind, {})
        for name in module.active_adapters:
            if name in held:
                part = held[name]
                found += [part] if isinstance(part, Tensor) else list(part.parameters())
    return found


def _hooks(module: Any) -> list[Any]:
    """What accelerate has put around a module."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))
