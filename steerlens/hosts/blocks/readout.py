"""A block's last linear map, whose Jacobian needs no computing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Readout(TorchFunctionMode):
    """While active, takes the n-th linear map out of the graph and keeps what it is made of.

        y = r + W h + b,   dy / dx = dr / dx + W dh / dx

    The gradients of y, all of them, begin with the product of W and the identity: a fifth of the work of a block's
    Jacobian, where W is the MLP's output matrix. Without the map in the graph they begin with W itself.

    Args:
        index: Which of the block's linear maps to take out.

    Attributes:
        count: How many there were.
        hidden: h, with its graph; None where there was no such map.
        weight: W, `[d hidden]`.
        out: `W h + b`, a leaf.
    """

    def __init__(self, index: int):
        TorchFunctionMode.__init__(self)
        self.index = index
        self.count = 0
        self.hidden: Tensor | None = None
        self.weight: Tensor
        self.out: Tensor

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if function not in (torch.nn.functional.linear, torch.addmm):
            return out
        self.count += 1
        if self.count - 1 == self.index and not kwargs:
            # addmm(bias, input, matrix) is the linear map of GPT-2
            first = function is torch.addmm
            self.hidden, weight = args[first : first + 2]
            self.weight = (weight.T if first else weight).detach()
            self.out = out.detach().requires_grad_()
            out = self.out.clone()  # some blocks add to it in place, which a leaf forbids
        return out

    def adds_to(self, y: Tensor) -> bool:
        """Whether y is the map's output plus something else: the gradient then comes through unchanged."""
        if self.hidden is None or self.out.numel() != y.numel() or not y.requires_grad:
            return False
        probe = torch.linspace(1, 2, y.numel()).to(y).view_as(y)
        (gradient,) = torch.autograd.grad(y, self.out, probe, retain_graph=True, allow_unused=True)
        return gradient is not None and bool((gradient.flatten() == probe.flatten()).all())
