"""What a type checker says of a user's lines; `make types` reads it, nothing runs it.

Each ignored line is a mistake that has to be reported: an ignore without one is an error itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

import steerlens as sl
from steerlens.hosts.types import Model


class Clipped(sl.Law):
    signals = ("error",)

    def __init__(self, setpoint: sl.Setpoint, gain: float, most: float):
        self.setpoint, self.gain, self.most = setpoint, gain, most

    def act(self, x: Tensor, now: sl.Now) -> tuple[Tensor, sl.Signals]:
        c, signals = self.setpoint.measure(x)
        return (self.gain * self.setpoint.lift(c)).clamp(-self.most, self.most), signals


def right(model: Model, pairs: sl.Pairs) -> Tensor:
    controller = sl.caa(model, pairs, layers=[3, 4], where="generated") + sl.lqr(
        model, pairs, layers=range(4), paper=True
    )
    own = sl.Controller([sl.Loop(Clipped(sl.Level(torch.ones(4), 1.0), 0.5, 2.0), "blocks.1.hook_resid_post")])
    for where in (slice(2, 5), torch.ones(4, dtype=torch.bool), lambda position: position > 3):
        controller = controller.at(where)
    with sl.steer(model, sl.when(controller + own, sl.gate(model, pairs)), record=("u", "error")) as run:
        run.plot()
    return run.record["error", 3]


def wrong(model: Model, pairs: sl.Pairs, controller: sl.Controller) -> None:
    sl.caa(model, pairs, where="lst")  # type: ignore[arg-type]
    sl.caa(model, pairs, layers="3")  # type: ignore[arg-type]
    sl.caa(model, pairs, layer=3)  # type: ignore[call-arg]
    sl.caa(model, ["I love it"])  # type: ignore[arg-type]
    sl.Pairs(["a"], ["b"], read="first")  # type: ignore[arg-type]
    sl.steer(model, controller, record=3)  # type: ignore[arg-type]
    sl.steer(model, sl.caa)  # type: ignore[arg-type]
    controller * "2"  # type: ignore[operator]
