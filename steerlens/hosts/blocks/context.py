"""Keys and values of a fixed context in front of one token's own, so that no gradient is computed for the context."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._pytree import tree_leaves, tree_map

#: What changes the form of a tensor and not its last dimensions' order or length, with arguments that do not name them.
_FORM = {"contiguous", "to", "float", "double", "type_as"}
#: What names all dimensions anew.
_SIZES = {"expand", "reshape", "view"}
_PRODUCTS = {"matmul", "__matmul__", "bmm"}


class FixedContext(TorchFunctionMode):
    """While active, keys and values of a cache are kept in two parts: the context's, and those of the present token.

    Ordinary attention joins both, and its gradient is one for every token of the context, which nobody asked for: a
    cotangent then costs `[head pos d_head]` numbers several times. Here products with the joined tensor are written as

        q [K; k]' = [q K', q k'],   [w, w'] [V; v] = w V + w' v

    with K and V constants, see `Times`. Views in between are followed; where anything else is done to them the joined
    tensor is made, so that the result is the same whatever a family's attention does.
    """

    def __init__(self) -> None:
        TorchFunctionMode.__init__(self)
        #: id of a stand-in: itself, the token's own part, and the dimension of the positions, counted from the last
        self._held: dict[int, tuple[Tensor, Tensor, int]] = {}

    @staticmethod
    def join(past: Tensor, new: Tensor, dim: int) -> Tensor:
        """The context's and the token's keys, or values, along a dimension; without a graph while a mode is active."""
        # torch keeps function modes by thread
        active = next((mode for mode in _get_current_function_mode_stack() if isinstance(mode, FixedContext)), None)
        past = past.expand(*(new.shape[i] if i == 0 else size for i, size in enumerate(past.shape)))
        if active is None:
            return torch.cat([past, new], dim)
        return active._hold(torch.cat([past, new.detach()], dim), new, dim - new.ndim)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not any(id(leaf) in self._held for leaf in tree_leaves((args, kwargs))):
            return function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        if name == "__get__" and not isinstance(value := function(*args, **kwargs), Tensor):
            return value  # shape, dtype, device and their like
        if name == "size":
            return function(*args, **kwargs)
        followed = self._follow(name, function, args, kwargs)
        if followed is None:
            args, kwargs = tree_map(self._whole, (args, kwargs))
            return function(*args, **kwargs)
        return followed

    def _follow(self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Tensor | None:
        """The result where the two parts can be told apart in it, else None."""
        held = self._held.get(id(args[0]))
        if name in _PRODUCTS and not kwargs and len(args) == 2 and id(args[0]) not in self._held:
            return self._product(*args)
        if name == "scaled_dot_product_attention":
            return self._attend(*args, **kwargs)
        if held is None or any(id(leaf) in self._held for leaf in tree_leaves((args[1:], kwargs))):
            return None
        stand_in, own, dim = held
        if name in _FORM:
            return self._hold(function(*args, **kwargs), function(own, *args[1:], **kwargs), dim)
        if name == "transpose" and not kwargs:
            pair = [axis - own.ndim if axis >= 0 else axis for axis in args[1:]]
            moved = pair[1 - pair.index(dim)] if dim in pair else dim
            return self._hold(function(*args), function(own, *args[1:]), moved)
        if name == "__getitem__" and isinstance(args[1], tuple):
            # unit dimensions in front of the positions
            key = args[1]
            plain = all(entry is None or entry == slice(None) for entry in key) and None not in key[dim:]
            if plain and sum(entry is not None for entry in key) == own.ndim:
                return self._hold(stand_in[key], own[key], dim)
        if name in _SIZES and not kwargs:
            sizes = list(args[1] if len(args) == 2 and not isinstance(args[1], int) else args[1:])
            if len(sizes) >= -dim and tuple(sizes[dim:]) == stand_in.shape[dim:]:
                before = function(stand_in, *sizes)
                sizes[dim] = 1
                return self._hold(before, function(own, *sizes), dim)
        return None

    def _product(self, left: Tensor, right: Tensor) -> Tensor | None:
        stand_in, own, dim = self._held[id(right)]
        last = stand_in.shape[dim] - 1
        if dim == -1:
            return torch.cat([times(left, stand_in[..., :last]), left @ own], dim=-1)
        if dim == -2:
            return times(left[..., :last], stand_in[..., :last, :]) + left[..., last:] @ own
        return None

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor | None:
        """Attention of one query in plain operations."""
        if not all(id(side) in self._held and self._held[id(side)][2] == -2 for side in (key, value)):
            return None
        if dropout_p or is_causal or id(query) in self._held or query.shape[-2] != 1:
            return None
        parts = []
        for side in (key, value):
            stand_in, own, dim = self._held[id(side)]
            if enable_gqa:
                groups = query.shape[-3] // own.shape[-3]
                stand_in, own = (part.repeat_interleave(groups, -3) for part in (stand_in, own))
            parts.append(self._hold(stand_in, own, dim))
        stand_in, own, _ = self._held[id(parts[0])]
        transposed = self._hold(stand_in.transpose(-1, -2), own.transpose(-1, -2), -1)
        scores = self._product(query * (query.shape[-1] ** -0.5 if scale is None else scale), transposed)
        assert scores is not None
        if attn_mask is not None:
            masked = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if masked else scores + attn_mask
        return self._product(scores.softmax(-1), parts[1])

    def _hold(self, stand_in: Tensor, own: Tensor, dim: int) -> Tensor:
        self._held[id(stand_in)] = (stand_in, own, dim)
        return stand_in

    def _whole(self, value: Any) -> Any:
        """What a stand-in stands for, with its graph; anything else unchanged."""
        held = self._held.get(id(value))
        if held is None:
            return value
        stand_in, own, dim = held
        return torch.cat([stand_in.narrow(dim, 0, stand_in.shape[dim] - 1), own], dim)


class Times(torch.autograd.Function):
    """`left @ constant`, whose gradients for many cotangents at once are rows of one product.

    PyTorch would give each cotangent a copy of the constant: for a context of 11 tokens a quarter of the time of a
    Jacobian, and more memory than all else that it takes.

    Upstream: torch (2.13) expands what is not batched in the vmapped gradient of a product; goes when it folds rows.
    """

    @staticmethod
    def forward(left: Tensor, constant: Tensor) -> Tensor:
        """`[... q n], [... n m] -> [... q m]`"""
        return left @ constant

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """What the gradient needs."""
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Differentiable itself."""
        return times(gradient, ctx.saved_tensors[0].mT), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], left: Tensor, constant: Tensor) -> tuple[Tensor, int]:
        """The batch becomes more rows of `left`."""
        at, other = in_dims
        if at is None or other is not None:
            sides = (
                side.expand(info.batch_size, *side.shape) if dim is None else side.movedim(dim, 0)
                for side, dim in zip((left, constant), in_dims, strict=True)
            )
            return times(*_aligned(*sides)), 0
        rows = left.movedim(at, -2)
        product = times(rows.flatten(-3, -2), constant)
        return product.unflatten(-2, rows.shape[-3:-1]), product.ndim - 1


def times(left: Tensor, constant: Tensor) -> Tensor:
    """See `Times`."""
    return Times.apply(left, constant)


def _aligned(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Two batches whose entries may have different numbers of dimensions."""
    ndim = max(left.ndim, right.ndim)
    return tuple(side.view(side.shape[0], *[1] * (ndim - side.ndim), *side.shape[1:]) for side in (left, right))  # type: ignore[return-value]
