"""Visits of an edit on the model's side of nnsight; sent to servers by source, so it names no module of ours."""

from __future__ import annotations

from typing import Any

from nnsight.intervention.interleaver import Event, Interleaver, Mediator, Pending
from torch.nn.modules.module import _has_any_global_hook

from steerlens.core import Pass

#: Whether the fast path is taken where it can be. If not, the edit itself visits every tap, with equal results.
FAST = True


class Walk:
    """Goes from tap to tap through the blocks, while the edit's own code waits.

    A block asks nnsight for a value, is switched to with it, asks for it to be replaced and is switched to again: some
    30 microseconds a location, which is more than a law takes. Where nobody else can act in between, the edit's worker
    parks at the first tap only. This answers for it there, moves its request on to the next tap, and wakes it behind
    the last one. The order of workers, caches and counts stay nnsight's. `lqr` on four blocks then takes 179 calls a
    token instead of 370, with equal operations; `pytest tests/test_traced_visits.py -k fast_path` compares both.

    Upstream: nnsight (0.8.1) has no function that an edit could register for several locations, to be called where the
    value is; with one, this file goes.

    Args:
        worker: The edit's.
        taps: All of the pass, in its order.
        start: Number of the first one to visit.
    """

    def __init__(self, worker: Any, run: Pass, taps: list[Any], start: int):
        self.worker = worker
        self.run = run
        self.taps = taps
        self.next = start

    def go(self) -> int:
        """Called by the edit; returns the number of the first tap that was not visited, when the model is there.

        An exception of a law rises from the model's forward pass, as it would from the edit.
        """
        self.worker.handle = self._serve
        try:
            return Mediator.value(self.taps[self.next].location)
        finally:  # also where the pass is given up
            del self.worker.handle

    def _serve(self, provider: str, raw: Any) -> Any:
        """In the place of `Mediator.handle`, which nnsight calls where the worker's request is met."""
        taps, worker = self.taps, self.worker
        tap = taps[self.next]
        raw, left = tap.change(self.run, raw)
        self.next += 1
        if tap.hands_on():
            self.run.at(tap.then.steers, left)
            self.next += 1
        following = taps[self.next] if self.next < len(taps) else None
        if following is not None and following.plain:
            worker.pending = Pending(Event.VALUE, following.location, worker.wanted(following.location))
        else:
            worker.pending = worker.switch(self.next)
        return raw


def alone(base: Any) -> Any:
    """The edit's worker where nothing but it can change a state in this pass, else None.

    Other workers may wait for the run's result.
    """
    interleaver = base.interleaver
    # in a server's sandbox the others are not to be seen
    if not FAST or type(interleaver) is not Interleaver or _has_any_global_hook():
        return None
    if interleaver.fragments is not None and interleaver.fragments.enabled:
        return None
    own = Mediator.current("the pass")
    # the values at hand are those of all invokes, and the worker of one may change its rows only
    if interleaver.batcher is not None and own.batch_group is not None:
        return None
    waiting = [other.pending for other in interleaver.mediators if other is not own]
    return own if all(pending is None or pending.provider == "result" for pending in waiting) else None
