"""Controls that an experiment gives instead of a law computing them, one row of a batch a condition."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from steerlens.core import Controller, Law, Loop, Now, Signals, Site
from steerlens.core.types import RecordSpec
from steerlens.hosts import Host
from steerlens.steering import steer

#: Positions by number, the first among them.
EVERYWHERE = slice(0, None)


class Weighted(Law):
    """A law whose control is multiplied by a factor of each row's own, `u_row = w_row * u`.

    With 0 the loop measures, remembers and adds nothing.

    Args:
        law: Computes u.
        weights: `[row]`; may be a leaf of a graph.
    """

    law: Law
    weights: Tensor

    def __init__(self, law: Law, weights: Tensor):
        self.law = law
        self.weights = weights
        self.signals = law.signals
        self.vectors = law.vectors

    def act(self, x: Tensor, now: Now) -> tuple[Tensor, Signals]:
        """The weighted control."""
        u, signals = self.law.act(x, now)
        # as many rows as there are: attaching tries a law on one
        weights = self.weights[: u.shape[0]]
        return u * weights.view(-1, *[1] * (u.ndim - 1)), signals


class Given(Law):
    """A control that does not look at the state.

    Recorded signals: `state`, the state that the control is added to, `[batch pos ...]`.

    Args:
        u: `[row pos ...]`, or one row for all; may be a leaf of a graph.
    """

    signals = ("state",)
    vectors = ("state",)

    def __init__(self, u: Tensor):
        self.u = u

    def act(self, x: Tensor, now: Now) -> tuple[Tensor, Signals]:
        """The control for as many rows and tokens as there are."""
        u = self.u[: x.shape[0], : x.shape[1]]
        return u.expand_as(x), {"state": lambda: x}


def given(u: Tensor, site: Site) -> Loop:
    """A loop that adds u at every position of a site."""
    return Loop(Given(u), site, where=EVERYWHERE, name="given")


def run(
    host: Host, controller: Controller, ids: Tensor, *, record: RecordSpec = None, trust: bool = False
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """One pass of a model under a controller: its logits `[batch pos vocab]`, and what each loop recorded."""
    if not controller.loops:
        return host.logits(ids), []
    with steer(host, controller, record=record, trust=trust) as attached:
        logits = host.logits(ids)
        names = attached.signals
        record_of = attached.record
    recorded = []
    for loop in controller.loops:
        own = names[loop.act].own[_rank(controller.loops, loop)]
        recorded.append({signal: record_of[name] for signal, name in own.items() if name in record_of})
    return logits, recorded


def _rank(loops: Sequence[Loop], loop: Loop) -> int:
    """Which of the loops at its site a loop is."""
    return [other for other in loops if other.act == loop.act].index(loop)
