"""One forward pass in an autograd graph that begins at the first block, not at the parameters; travels to servers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from steerlens.hosts.blocks.nominal import first, state_of

#: A module, and whether the activation is its `"input"` or its `"output"`.
Place = tuple[nn.Module, str]


def differentiate(
    forward: Callable[[], Tensor], entry: nn.Module, places: Sequence[Place], loss: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Gradients of a loss with respect to the tensors at some places of a forward pass.

    Args:
        forward: Runs the model; returns its logits.
        entry: The module whose input becomes a leaf, so that there is a graph whether or not weights ask for one.
        places: Where the tensors are, no earlier than `entry`.
        loss: From the logits to a scalar.
    """
    states: dict[int, Tensor] = {}
    thread = get_ident()

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if get_ident() != thread:
            return args, kwargs
        if "hidden_states" in kwargs:
            return args, kwargs | {"hidden_states": kwargs["hidden_states"].detach().requires_grad_()}
        return (args[0].detach().requires_grad_(), *args[1:]), kwargs

    handles = []
    try:
        handles.append(entry.register_forward_pre_hook(enter, with_kwargs=True))
        for index, place in enumerate(places):
            handles.append(watch(place, partial(states.__setitem__, index)))
        value = loss(forward())
    finally:
        for handle in handles:
            handle.remove()
    return list(torch.autograd.grad(value, [states[index] for index in range(len(places))]))


def watch(place: Place, note: Callable[[Tensor], None]) -> Any:
    """Call `note` with the tensor at a place in every forward pass of this thread; returns the handle."""
    thread = get_ident()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if get_ident() == thread:
            note(state_of(args, kwargs))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if get_ident() == thread:
            note(first(output))

    module, side = place
    if side == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


def pooled_gradients(
    forward: Callable[[], Tensor],
    entry: nn.Module,
    places: Sequence[Place],
    loss: Callable[[Tensor], Tensor],
    weights: Tensor,
) -> list[Tensor]:
    """`sum_t w_t dL / dx_t` for each place, whatever the mode of the caller.

    Args:
        weights: `[batch pos]`; the other arguments are those of `differentiate`.
    """
    with torch.inference_mode(False), torch.enable_grad():
        found = differentiate(forward, entry, places, loss)
        # some modules are given batch and position as one dimension
        return [pool(g if g.ndim > 2 else g.view(*weights.shape, -1), weights) for g in found]


def pool(x: Tensor, weights: Tensor | None) -> Tensor:
    """`sum_t w_t x_t`: `[batch pos ...], [batch pos] -> [batch ...]`, in float32 at least; a copy without weights."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if weights is None:
        return x.to(dtype, copy=True)  # some blocks add to a branch in place
    x, weights = x.to(dtype), weights.to(device=x.device, dtype=dtype)
    weights = weights.reshape(*weights.shape, *[1] * (x.ndim - 2))
    # a pad may hold anything, also NaN
    return torch.where(weights != 0, weights * x, 0.0).sum(1)
