"""How strong the gains of a regulator are, what they do to the plant, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerlens.control.linearization import Linearization
from steerlens.control.riccati import CostToGo
from steerlens.core import Controller, Law, Loop, Setpoint, map_tensors
from steerlens.core.types import Figure, Frame
from steerlens.diagnose.bound import Lyapunov
from steerlens.diagnose.result import curves, frame
from steerlens.diagnose.tracking import Tracking
from steerlens.laws.feedback import Feedback
from steerlens.laws.relative import Relative


@dataclass(frozen=True)
class ClosedLoop:
    """Gains, contraction and cost of a regulator, one number a block, `[layer]`; NaN where no loop acts.

    Attributes:
        gain: `|K_t|`, largest singular value of the whole gain.
        applied: The same of the part that is applied, the gain on the setpoint's directions; for one direction `|g_t|`.
        open_norm: `|A_t|`, how much the block alone can stretch a deviation.
        closed_norm: `|A_t - K_t|`, with the whole gain applied.
        contraction: The same in the norms of `Lyapunov`, in which it is below 1 always: the nearer to 1, the longer a
            deviation lives, in that block and after it.
        predicted: `e_t' S_t e_t` of the token's error e_t: the cost from block t on of the regulator with its whole
            gain on a linear plant.
        realised: `sum_{s >= t} q_s |e_s|^2 + r_s |u_s|^2`, and `qf |e_T|^2` if the last state has a setpoint: the cost
            that occurred.
    """

    gain: Tensor
    applied: Tensor
    open_norm: Tensor
    closed_norm: Tensor
    contraction: Tensor
    predicted: Tensor
    realised: Tensor

    def table(self) -> Frame:
        """One row a block, a pandas DataFrame."""
        names = ("gain", "applied", "open_norm", "closed_norm", "contraction", "predicted", "realised")
        return frame({"layer": range(len(self.gain)), **{name: getattr(self, name) for name in names}}, "layer")

    def plot(self) -> Figure:
        """Norms of the gain, of the blocks alone and of the blocks in closed loop."""
        names = {
            "gain": "gain |K|",
            "applied": "gain as applied",
            "open_norm": "block |A|",
            "closed_norm": "closed |A - K|",
        }
        lines = {label: (range(len(self.gain)), getattr(self, name)) for name, label in names.items()}
        return curves(lines, title="Gains and closed loop", x="layer", y="largest singular value (no unit)", log=True)


def closed_loop(
    controller: Controller,
    *,
    linearization: Linearization,
    along: Tracking | None = None,
    final: Setpoint | None = None,
    q: float | Sequence[float] | None = None,
    r: float | Sequence[float] | None = None,
    qf: float | None = None,
) -> ClosedLoop:
    """What the gains of a linear quadratic regulator do to its plant, and its predicted against its realised cost.

    The cost-to-go S_t is that of the plant and the weights: on a linear plant, with the whole gain on the whole state
    (`u = K e`, e = r - x, and a reference r that the plant follows by itself), predicted and realised cost are equal at
    every block. A setpoint on one direction is not that regulator: it feeds back one coordinate of the state, the
    blocks bring in new error from the context, and the last state has no setpoint. The ratio of the two costs shows how
    far such a loop is from that regulator.

    Args:
        controller: From `lqr(..., full_gain=True)`: loops of the law `Feedback` that kept their matrix.
        linearization: The plant, from `linearize`.
        along: From `tracking`: the token whose cost is computed; None: both costs are NaN.
        final: A setpoint for the last block's output; None: the realised cost is without the last term. If levels are
            counted from the token's own state (`origin="own"`), it is measured on the deviation, too.
        q, r, qf: Weights; default: those of the controller's recipe.

    Raises:
        ValueError: a loop without its whole gain, two loops at one block, no loop at all, a recipe without weights, or
            another number of blocks.
    """
    loops = _loops(controller, len(linearization))
    T, weights = len(linearization), _weights(controller, len(linearization), q=q, r=r, qf=qf)
    A = [jacobian.double() for jacobian in linearization.jacobians]
    blank = torch.full((T,), torch.nan, dtype=torch.float64)
    gain, applied, closed = blank.clone(), blank.clone(), list(A)
    for t, loop in loops.items():
        law = _law(loop)
        assert law.matrix is not None  # _loops has seen to it
        K = loop.factor * law.matrix
        gain[t] = torch.linalg.matrix_norm(K, ord=2)
        applied[t] = torch.linalg.matrix_norm(loop.factor * law.gains, ord=2)
        closed[t] = A[t] - K
    predicted, realised = _costs(A, loops, weights, along, final)
    return ClosedLoop(
        gain=gain,
        applied=applied,
        open_norm=torch.stack([torch.linalg.matrix_norm(each, ord=2) for each in A]),
        closed_norm=torch.stack([torch.linalg.matrix_norm(each, ord=2) for each in closed]),
        contraction=Lyapunov(closed).contraction(),
        predicted=predicted,
        realised=realised,
    )


def _costs(
    A: Sequence[Tensor],
    loops: dict[int, Loop],
    weights: tuple[list[float], list[float], float],
    along: Tracking | None,
    final: Setpoint | None,
) -> tuple[Tensor, Tensor]:
    """Cost-to-go from every block on, predicted and realised, `[layer]` each."""
    predicted, realised = (torch.full((len(A),), torch.nan, dtype=torch.float64) for _ in range(2))
    if along is None:
        return predicted, realised
    q, r, qf = weights
    states = along.rollout.states.double().cpu()
    if any(isinstance(loop.law, Relative) for loop in loops.values()):
        states = states - along.rollout.own.double().cpu()
    controls = along.rollout.signal("u")
    cost = CostToGo.scalar(qf, A[0].shape[0])
    paid = torch.zeros((), dtype=torch.float64)
    if final is not None:
        paid = qf * _error(final, states[-1]).square().sum()
    for t in range(len(A) - 1, -1, -1):
        cost.step(A[t], q[t], r[t])
        if t in loops:
            e = _error(_law(loops[t]).setpoint, states[t])
            u = controls[t].double().cpu()
            paid = paid + q[t] * e.square().sum() + r[t] * u.square().sum()
            predicted[t], realised[t] = e @ cost.S @ e, paid
    return predicted, realised


def _error(setpoint: Setpoint, x: Tensor) -> Tensor:
    """e at the state x, `[d]`, float64."""
    return map_tensors(setpoint, lambda tensor: tensor.to(x)).error(x)


def _law(loop: Loop) -> Feedback:
    """The loop's feedback law in float64 on the CPU."""
    return map_tensors(_feedback(loop), lambda tensor: tensor.double().cpu())


def _feedback(loop: Loop) -> Law:
    return loop.law.law if isinstance(loop.law, Relative) else loop.law


def _loops(controller: Controller, T: int) -> dict[int, Loop]:
    if not controller.loops:
        raise ValueError("this controller has no loop; closed_loop needs one from lqr(..., full_gain=True)")
    loops: dict[int, Loop] = {}
    for loop in controller.loops:
        t = loop.act.layer
        law = _feedback(loop)
        if not isinstance(law, Feedback) or law.matrix is None:
            raise ValueError(f"the loop at {loop.act} holds no whole gain; fit it with lqr(..., full_gain=True)")
        if t in loops:
            raise ValueError(f"two loops act at block {t}; closed_loop takes one regulator at a time")
        if t >= T:
            raise ValueError(f"a loop acts at block {t}, the linearization has {T} blocks")
        loops[t] = loop
    return loops


def _weights(controller: Controller, T: int, **given: Any) -> tuple[list[float], list[float], float]:
    arguments = controller.recipe.get("arguments", {})
    found = {name: arguments.get(name) if value is None else value for name, value in given.items()}
    missing = [name for name, value in found.items() if value is None]
    if missing:
        raise ValueError(f"the controller's recipe has no {', '.join(missing)}; pass the regulator's weights")
    q, r = (
        [float(weight)] * T if isinstance(weight, (int, float)) else [float(each) for each in weight]
        for weight in (found["q"], found["r"])
    )
    if {len(q), len(r)} != {T}:
        raise ValueError(f"weights for {len(q)} and {len(r)} blocks, the linearization has {T}")
    return q, r, float(found["qf"])
