"""The control laws that several methods share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from steerlens.core.law import Law, Setpoint, Signals
from steerlens.core.now import Now
from steerlens.laws.norms import norm


class Feedback(Law):
    """Linear feedback on a setpoint's error.

        u = K e = c @ gains,   gains = basis @ K',   gains: [m d]

    Only the rows K b of the gain on the setpoint's basis are kept, not K: 4 d flops a token for one direction.

    Args:
        setpoint: Measures the error in coordinates c.
        gains: K applied to each basis vector, `[m d]`.
        matrix: K itself, `[d d]`, kept for inspection only.

    Signals: those of the setpoint, `error` (distance to it, in activation units) among them.
    """

    def __init__(self, setpoint: Setpoint, gains: Tensor, *, matrix: Tensor | None = None):
        self.setpoint = setpoint
        self.gains = gains
        self.matrix = matrix

    @property
    def signals(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of the setpoint."""
        return self.setpoint.signals

    def act(self, x: Tensor, now: Now) -> tuple[Tensor, Signals]:
        """`u = c @ gains`"""
        c, signals = self.setpoint.measure(x)
        # one direction: the same numbers from a product element by element, at half the price of a matrix product
        return (c * self.gains if self.gains.shape[0] == 1 else c @ self.gains), signals


class FactoredFeedback(Law):
    """Feedback through a gain of low rank, kept in two factors.

        u = K e = (e @ inputs') @ outputs,   K = outputs' inputs

    Args:
        setpoint: Measures the error e.
        inputs: Rows that read the error, `[k d]`.
        outputs: Rows that write the control, `[k d]`.

    Signals: those of the setpoint.
    """

    def __init__(self, setpoint: Setpoint, inputs: Tensor, outputs: Tensor):
        self.setpoint = setpoint
        self.inputs = inputs
        self.outputs = outputs

    @property
    def signals(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of the setpoint."""
        return self.setpoint.signals

    def act(self, x: Tensor, now: Now) -> tuple[Tensor, Signals]:
        """`u = (e @ inputs') @ outputs`"""
        c, signals = self.setpoint.measure(x)
        return linear(self.setpoint.lift(c), self.inputs) @ self.outputs, signals


class Preview(Law):
    """Feedback on the errors that later layers will have if nothing more is done.

        u = c @ outputs,   c = targets - inputs x

    where a row of `inputs` predicts a later feature from the present state, to first order.

    Args:
        setpoint: The present layer's own, for its signals; it does not enter the control.
        inputs: `[k d]`, a row for each later feature.
        targets: Level of each feature less the constant of its prediction, `[k]`, in activation units.
        outputs: `[k d]`.

    Signals: those of the setpoint; `predicted_error` `[batch pos]`, the norm of c, in activation units.
    """

    def __init__(self, setpoint: Setpoint, inputs: Tensor, targets: Tensor, outputs: Tensor):
        self.setpoint = setpoint
        self.inputs = inputs
        self.targets = targets
        self.outputs = outputs

    @property
    def signals(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of the setpoint, and `predicted_error`."""
        return (*self.setpoint.signals, "predicted_error")

    def act(self, x: Tensor, now: Now) -> tuple[Tensor, Signals]:
        """`u = (targets - inputs x) @ outputs`"""
        c = self.targets - linear(x, self.inputs)
        # measured only if somebody looks: the setpoint does not enter the control
        signals = {name: lambda name=name: self.setpoint.measure(x)[1][name]() for name in self.setpoint.signals}
        return c @ self.outputs, {**signals, "predicted_error": lambda: norm(c)}


class Pid(Law):
    """Proportional, integral and derivative feedback, with the layers as time.

        u_t = kp e_t + ki s_t + kd (e_t - e_{t-1}),   s_t = s_{t-1} + e_t

    Sum and last error start from zero in every forward pass, and each token has its own.

    Args:
        setpoint: Measures the error e.
        kp, ki, kd: Gains, no unit.
        reset: Set the sum to zero here, after this layer's error was added, so that the error enters neither this
            layer's integral nor a later one.
        carry: Take e_{t-1} of the first layer from the last layer at the token before (the last one that was computed
            before this forward pass), as the authors do.

    Signals: those of the setpoint; `integral` and `derivative`, norms of s_t and of e_t - e_{t-1}, `[batch pos]`, in
    activation units.

    Source: S-PID in A-LQR (arXiv 2604.19018).
    """

    def __init__(
        self, setpoint: Setpoint, kp: float, ki: float, kd: float, *, reset: bool = False, carry: bool = False
    ):
        self.setpoint = setpoint
        self.kp = kp
        self.ki = ki
        self.kd = kd
        self.reset = reset
        self.carry = carry

    @property
    def signals(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of the setpoint, `integral` and `derivative`."""
        return (*self.setpoint.signals, "integral", "derivative")

    @property
    def stepwise(self) -> bool:  # type: ignore[override]
        """If the error is carried over tokens."""
        return self.carry

    def act(self, x: Tensor, now: Now) -> tuple[Tensor, Signals]:
        """`u = kp e + ki s + kd (e - e_before)`"""
        c, signals = self.setpoint.measure(x)
        e = self.setpoint.lift(c)
        before = now.layers.get("pid_error")
        if before is None and self.carry:
            before = now.sequence.get("pid_error")
            before = None if before is None else before[:, -1:]
        total = now.layers.get("pid_sum")
        total = e if total is None else total + e
        total = torch.zeros_like(total) if self.reset else total
        change = e if before is None else e - before
        now.layers["pid_sum"], now.layers["pid_error"] = total, e
        if self.carry:
            # of all tokens: those that the model takes back are dropped, see `Sequence.cut`
            now.sequence["pid_error"] = e.detach()
        u = self.kp * e + self.ki * total + self.kd * change
        return u, {**signals, "integral": lambda: norm(total), "derivative": lambda: norm(change)}


class Add(Law):
    """Add a constant vector: `u = v`.

    Args:
        vector: v, of the state's shape without batch and position: `[d]`, or `[head d_head]` at `z`.
    """

    def __init__(self, vector: Tensor):
        self.vector = vector

    def act(self, x: Tensor, now: Now) -> tuple[Tensor, Signals]:
        """`u = v`, at every token."""
        return self.vector.expand_as(x), {}


class Project(Law):
    """Move the projection on a subspace to a reference point: directional ablation.

        u = (r - x) B' B

    With `r = 0` the state loses the subspace; with `r` the mean of neutral activations it becomes neutral there.

    Args:
        basis: B, orthonormal rows `[m d]`.
        reference: r, `[d]`.

    Signals: `projection` `[batch pos]`, norm of `B (x - r)` before the control, in activation units.
    """

    signals = ("projection",)

    def __init__(self, basis: Tensor, reference: Tensor):
        self.basis = basis
        self.reference = reference

    def act(self, x: Tensor, now: Now) -> tuple[Tensor, Signals]:
        """`u = (r - x) B' B`"""
        c = (self.reference - x) @ self.basis.T
        return c @ self.basis, {"projection": lambda: norm(c)}
