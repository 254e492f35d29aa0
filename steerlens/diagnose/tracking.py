"""Does a steered token follow the prediction of the linear model of the blocks?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steerlens.control.linearization import Linearization
from steerlens.core import Controller, Record, Setpoint, map_tensors
from steerlens.core.types import Figure, Frame
from steerlens.diagnose.bound import Lyapunov, tracking_bound
from steerlens.diagnose.result import curves, frame
from steerlens.diagnose.rollout import Rollout, affine, check_followed, close, exact_dtype, plant_of, roll
from steerlens.fit.contrast import Text, tokenize
from steerlens.hosts import Nominal, host_of
from steerlens.hosts.types import Model
from steerlens.laws.feedback import Feedback
from steerlens.laws.relative import Relative


@dataclass(frozen=True)
class Tracking:
    """Feature errors of one token at every controlled layer, and the error of the linear model.

    All in activation units, `[layer]` over the controlled layers, unless another unit or shape is given.

    Attributes:
        layers: Controlled layers that have an error to report.
        unsteered: Distance to the setpoint that the controls would have met without any control.
        predicted: The same in closed loop, blocks replaced by their linear models.
        actual: The same in closed loop, blocks as they are.
        recorded: `actual` as a run recorded it; NaN without a record.
        bound: Upper bound on `|actual - predicted|`; NaN if it was not requested, or the loop's law is not `Feedback`.
        state_gap: Distance between the actual and the predicted state before every block and at the end, in the norms
            of `Lyapunov`, `[T+1]`; NaN if no bound was requested.
        state_bound: Upper bound on it, `[T+1]`.
        state_error: `|x_predicted - x_actual| / |x_actual - x_unsteered|` of the whole state before every block and at
            the end, `[T+1]`, no unit; NaN where nothing was steered yet.
        rollout: The actual path, states and signals.
    """

    layers: tuple[int, ...]
    unsteered: Tensor
    predicted: Tensor
    actual: Tensor
    recorded: Tensor
    bound: Tensor
    state_gap: Tensor
    state_bound: Tensor
    state_error: Tensor
    rollout: Rollout

    def table(self) -> Frame:
        """One row a controlled layer, a pandas DataFrame."""
        names = ("unsteered", "predicted", "actual", "recorded", "bound")
        columns = {name: getattr(self, name) for name in names}
        return frame({"layer": self.layers, **columns, "state_error": self.state_error[list(self.layers)]}, "layer")

    def plot(self) -> Figure:
        """Distance to the setpoint by layer: unsteered, predicted, actual, and the bound around the prediction."""
        lines = {name: (self.layers, getattr(self, name)) for name in ("unsteered", "predicted", "actual")}
        if not self.bound.isnan().all():
            lines["predicted + bound"] = (self.layers, self.predicted + self.bound)
        return curves(
            lines,
            title="Tracking error of the last token",
            x="layer",
            y="distance to the setpoint (activation units)",
            log=True,
            dashed=("predicted", "predicted + bound"),
        )


def tracking(
    model: Model,
    text: Text,
    *,
    controller: Controller,
    linearization: Linearization | None = None,
    record: Record | None = None,
    bound: bool = True,
    scales: Sequence[float] = (0.5, 2.0),
    prepend_bos: bool | None = None,
) -> Tracking:
    """Predicted against actual tracking error of the last token of a text, layer by layer, with a bound.

    The token is sent through the blocks with the loop closed (what `steer` does at a prompt's last token), and through
    their linear models around its own unsteered path x, with the loop closed as well:

        actual:     d_{t+1} = f_t(x_t + d_t) - f_t(x_t) + u_t,   predicted:  d_{t+1} = A_t d_t + u_t,   d_0 = 0

    The remainder r_t = f_t(x_t + d_t) - f_t(x_t) - A_t d_t is what a linear model leaves out. With A_cl,t the Jacobian
    of a closed step and L_t the curvature, `|r_t|_{t+1} <= L_t/2 |d_t|_t^2`, the feature errors differ by at most

        sum_{i<t} |Phi(t, i+1)' v_t|*_{i+1} (L_i / 2) |d_i|_i^2,    Phi(t, i) = A_cl,t-1 ... A_cl,i

    in the norms of `Lyapunov` (the star: dual norm), and the states by at most `tracking_bound` from zero. L_t is the
    largest seen in this rollout and in some with the control scaled: the bound holds for this token by construction
    (up to rounding in the model's dtype) and shows the largest effect of a given curvature. It does not hold for
    another text.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model, with no controller attached.
        text: A string, tuple, messages or token ids, of at least 2 tokens.
        controller: Loops on the residual stream with `where="last"`, at least one with an `error` signal.
        linearization: The linear model to test; default: the Jacobians of this very text. One averaged over other texts
            is what `lqr` was fitted with; its mismatch then counts as remainder.
        record: Of a run on this text, alone in its batch, to be shown next to `actual`.
        bound: Compute the bounds: T^2/2 products of `[d d]` matrices, and as many of their singular values.
        scales: Factors on the control in the additional rollouts from which L is taken.
        prepend_bos: As in `Pairs`.

    Raises:
        ValueError: loops that it cannot follow, or no loop that reports an error; a linearization of another model; a
            record without the signal `error`.

    Source: arXiv 2604.19018, whose bound is for tracking a path with the whole gain; here it is carried over to
    setpoints, which force the loop: `u_t` on the unsteered path is part of the prediction.
    """
    host = host_of(model)
    check_followed(controller)
    tokens = tokenize(text, host, prepend_bos)[0]
    nominal = host.nominal(tokens)
    jacobians = plant_of(host, nominal, linearization)
    dtype, position = exact_dtype(host), len(tokens) - 1
    start = nominal.states[0]
    own = nominal.states
    exactly = [state.to(dtype) for state in own]
    unsteered = roll(nominal.blocks, start, controller * 0, position, own)
    actual = roll(nominal.blocks, start, controller, position, own)
    predicted = roll(affine(nominal, jacobians, dtype), start.to(dtype), controller, position, exactly)
    layers = tuple(actual.signal("error"))
    if not layers:
        raise ValueError("no loop of this controller reports an error; tracking needs a setpoint")
    blank = torch.full((len(jacobians) + 1,), torch.nan)
    gap, limit, feature = blank, blank, dict[int, Tensor]()
    if bound:
        rollouts = [actual, *(roll(nominal.blocks, start, controller * scale, position, own) for scale in scales)]
        loop, forcing = close(nominal, jacobians, controller, position, dtype)
        _check_affine(loop, forcing, predicted.states - torch.stack(nominal.states).to(dtype))
        gap, limit, feature = _bounds(nominal, jacobians, loop, controller, rollouts, predicted)
    missed = (predicted.states - actual.states.to(dtype)).norm(dim=-1)
    moved = (actual.states - torch.stack(nominal.states)).norm(dim=-1).to(dtype)
    return Tracking(
        layers=layers,
        unsteered=_pick(unsteered.signal("error"), layers),
        predicted=_pick(predicted.signal("error"), layers),
        actual=_pick(actual.signal("error"), layers),
        recorded=_recorded(record, layers, position),
        bound=_pick(feature, layers),
        state_gap=gap.cpu(),
        state_bound=limit.cpu(),
        state_error=torch.where(moved > 0, missed / moved, torch.nan).cpu(),
        rollout=actual,
    )


def _bounds(
    nominal: Nominal,
    jacobians: Sequence[Tensor],
    loop: list[Tensor],
    controller: Controller,
    rollouts: Sequence[Rollout],
    predicted: Rollout,
) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """The gap between the actual states (the first rollout's) and the predicted ones, its bound, and the features'."""
    dtype, T = predicted.states.dtype, len(loop)
    x = torch.stack(nominal.states).to(dtype)
    weights = Lyapunov(loop)
    ratios, size = [], torch.zeros(T, dtype=dtype, device=x.device)
    for t, block in enumerate(nominal.blocks):
        at = torch.stack([rollout.states[t] for rollout in rollouts])
        d = at.to(dtype) - x[t]
        with torch.no_grad():
            r = block(at).to(dtype) - x[t + 1] - d @ jacobians[t].to(dtype).T
        length = weights.norm(t, d)
        # an unmoved state has no remainder
        ratio = torch.where(length > 0, 2 * weights.norm(t + 1, r) / length**2, 0.0)
        ratios.append(ratio.max())
        size[t] = length[0]
    curvature = torch.stack(ratios)
    limit = tracking_bound(weights.transitions(), curvature, size, 0.0)
    gap = torch.stack([weights.norm(t, rollouts[0].states[t].to(dtype) - predicted.states[t]) for t in range(T + 1)])
    remainder = curvature / 2 * size**2
    squares: dict[int, Tensor] = {}
    for part in controller.loops:
        law = part.law.law if isinstance(part.law, Relative) else part.law
        if isinstance(law, Feedback):
            t = part.sense.layer
            # the reference does not move with the state, so that a deviation changes both kinds of error alike
            rows = _error_rows(law.setpoint, x[t])
            squares[t] = squares.get(t, torch.zeros(()).to(x)) + _feature_bound(rows, t, weights, remainder) ** 2
    return gap, limit, {t: square.sqrt() for t, square in squares.items()}


def _feature_bound(rows: Tensor, k: int, weights: Lyapunov, remainder: Tensor) -> Tensor:
    """Largest change of the projections on `rows` before block k that remainders of earlier steps make.

    One row vector is carried back instead of the transition matrices carried forward: tighter, and d^2 instead of d^3.
    """
    total = torch.zeros(len(rows)).to(rows)
    z = rows
    for i in range(k - 1, -1, -1):
        total = total + weights.dual(i + 1, z) * remainder[i]
        z = z @ weights.loop[i]
    return torch.linalg.vector_norm(total)


def _error_rows(setpoint: Setpoint, x: Tensor) -> Tensor:
    """Rows J with `|J d|` the change of the error e when the state x moves by d, `[m d]`."""
    setpoint = map_tensors(setpoint, lambda tensor: tensor.to(x))
    with torch.inference_mode(False), torch.enable_grad():
        slope = torch.func.jacrev(lambda x: setpoint.measure(x)[0])(x).detach()
    # e = c @ basis: an orthonormal frame of the basis leaves norms as they are
    return torch.linalg.qr(setpoint.basis.T).R @ slope


def _check_affine(loop: Sequence[Tensor], forcing: Tensor, d: Tensor) -> None:
    """Raises ValueError if predicted deviations d `[T+1 d]` do not follow `d[t+1] = A_cl d[t] + w[t]`."""
    for t, A in enumerate(loop):
        off = d[t + 1] - A @ d[t] - forcing[t]
        # rounding is orders below, any curvature of a law orders above
        if off.norm() > 1e-4 * (1 + d[t + 1].norm()):
            raise ValueError(
                f"the control at layer {t} is not affine in the state: no bound is known; pass bound=False"
            )


def _pick(values: dict[int, Tensor], layers: Sequence[int]) -> Tensor:
    """By layer, float64 on the CPU; NaN where a layer has no value."""
    blank = torch.tensor(torch.nan)
    return torch.stack([values.get(layer, blank).detach().double().cpu() for layer in layers])


def _recorded(record: Record | None, layers: Sequence[int], position: int) -> Tensor:
    if record is None:
        return torch.full((len(layers),), torch.nan)
    held = record.layers("error")
    columns = {value.shape[1] for value in held.values()}
    if min(columns) <= position:
        raise ValueError(f"the record has {min(columns)} tokens, the text has {position + 1}; it is of another run")
    return _pick({layer: value[0, position] for layer, value in held.items()}, layers)
