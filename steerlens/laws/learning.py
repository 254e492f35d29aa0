"""Laws that move the state as a step of gradient descent would."""

from __future__ import annotations

from torch import Tensor

from steerlens.core.law import Law, Signals
from steerlens.core.now import Now
from steerlens.laws.norms import share


class Kernel(Law):
    """A step along the examples' gradients, each weighted by the inner product of its activation with the state.

        u = -(1/N) sum_i <x, x_i> g_i

    Args:
        states: x_i, `[i d]`.
        gradients: g_i, `[i d]`.
        count: N.
    """

    def __init__(self, states: Tensor, gradients: Tensor, count: int):
        self.states = states
        self.gradients = gradients
        self.count = count

    def act(self, x: Tensor, now: Now) -> tuple[Tensor, Signals]:
        """`u = -(1/N) (x X') G`"""
        return (x @ self.states.T) @ self.gradients / -self.count, {}


class Drift(Law):
    """Follow the tangent of the state along a direction of the parameters, backwards.

        u_t = -n dx_t

    Args:
        norm: n, `[]`: the learning rate times the gradient's norm, since the direction has unit norm.

    Signals: `relative` `[batch pos]`, norm of u over norm of x, no unit.
    """

    signals = ("relative",)

    def __init__(self, norm: Tensor):
        self.norm = norm

    def act(self, x: Tensor, now: Now) -> tuple[Tensor, Signals]:
        """`u = -n dx`"""
        u = -self.norm * now.tangent
        return u, {"relative": lambda: share(u, x)}
