"""Plain PyTorch hooks on a TransformerBridge's Hugging Face modules: what other libraries do."""

from __future__ import annotations

import torch

import steerlens as sl

TOKENS = torch.tensor([[3, 17, 25, 29, 4], [5, 6, 7, 8, 9]])
EVERY = slice(0, None)
BLOCKS = {"llama": "model.layers", "gemma": "model.layers", "gpt2": "transformer.h"}


def vector(seed, size=32):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def steered(model, controller):
    with torch.no_grad(), sl.steer(model, controller, record=None):
        return model(TOKENS)


def hooked(model, hooks):
    """Logits with plain PyTorch hooks: function of a module's output, by the module's path."""

    def hook(change):
        def apply(module, inputs, output):
            first = change(output[0] if isinstance(output, tuple) else output)
            return (first, *output[1:]) if isinstance(output, tuple) else first

        return apply

    inner = model.original_model
    handles = [inner.get_submodule(path).register_forward_hook(hook(change)) for path, change in hooks.items()]
    try:
        with torch.no_grad():
            return model(TOKENS)
    finally:
        for handle in handles:
            handle.remove()
