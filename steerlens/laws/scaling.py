"""Laws that scale the state, element by element."""

from __future__ import annotations

from torch import Tensor

from steerlens.core.law import Law, Signals
from steerlens.core.now import Now
from steerlens.laws.norms import share


class Scale(Law):
    """Scale elements of the state: `u = m * x`.

    Args:
        mask: m, 1 for the elements to scale, else 0; the state's shape without batch and position, or `[head 1]`.

    Signals: `share` `[batch pos]`, norm of `m * x` over norm of `x`, no unit.
    """

    signals = ("share",)

    def __init__(self, mask: Tensor):
        self.mask = mask

    def act(self, x: Tensor, now: Now) -> tuple[Tensor, Signals]:
        """`u = m * x`"""
        u = self.mask * x
        return u, {"share": lambda: share(u, x)}


class Frozen(Law):
    """Set the state to the scaled unsteered one of the last prompt token: `u = f * x0 - x`.

    Args:
        factors: f, `1 + s` for the elements to scale, else 1; the state's shape without batch and position, or
            `[head 1]`.
    """

    def __init__(self, factors: Tensor):
        self.factors = factors

    def act(self, x: Tensor, now: Now) -> tuple[Tensor, Signals]:
        """`u = f * x0 - x`"""
        return self.factors * now.summary[:, None] - x, {}


class Dynamic(Law):
    """Keep the neurons that the prompt used: `u = (m - 1) * a`, `m = 1 if norms * rms(a) > threshold, else 0`.

    Args:
        norms: Norm of what one unit of each neuron writes, `[neuron]`.
        threshold: `[]`, in the units of the residual stream.

    Signals: `kept` `[batch pos]`, share of the neurons that stay on, no unit.
    """

    signals = ("kept",)

    def __init__(self, norms: Tensor, threshold: Tensor):
        self.norms = norms
        self.threshold = threshold

    def act(self, x: Tensor, now: Now) -> tuple[Tensor, Signals]:
        """`u = (m - 1) * a`"""
        kept = (self.norms * now.summary > self.threshold).to(x.dtype)
        return (kept[:, None] - 1) * x, {"kept": lambda: kept.mean(-1)[:, None].expand(-1, x.shape[1])}
