"""What runs inside nnsight's edits, here or on a server: sent by source, so it names no module of ours."""

from __future__ import annotations

from typing import Any

import torch
from nnsight.intervention.interleaver import OutOfOrderError
from nnsight.intervention.iterator import Iterations
from torch import Tensor

from steerlens.core import Pass, Site
from steerlens.hosts.hf import call_shape


class Tap:
    """One location that the edit visits: where the state is read, and where a control goes.

    Args:
        envoy: The module.
        side: `"input"` or `"output"`.
        read: The site whose state is there.
        steers: The site of the pass that it serves; None where it only reads.
        heads: Number of heads into which the last dimension is split, 0 for none.
        stash: Keep the value for the next tap, which needs it to form the state.
    """

    def __init__(self, envoy: Any, side: str, read: Site, steers: Site | None, heads: int, stash: bool):
        self.envoy = envoy
        self.side = side
        self.read = read
        self.steers = steers
        self.heads = heads
        self.stash = stash

    def value(self) -> Tensor:
        """The state there, heads split."""
        raw = self.envoy.input if self.side == "input" else self.envoy.output
        x = raw if isinstance(raw, torch.Tensor) else raw[0]
        return x.unflatten(-1, (self.heads, -1)) if self.heads else x

    def run(self, run: Pass, before: Any) -> Any:
        """Visit the location; returns what the next tap needs of it."""
        raw = self.envoy.input if self.side == "input" else self.envoy.output
        x = raw if isinstance(raw, torch.Tensor) else raw[0]
        if self.stash or self.steers is None:
            return x
        split = x.unflatten(-1, (self.heads, -1)) if self.heads else x
        state = split if before is None else before + split
        steered = run.at(self.steers, state, carrier=split)
        if steered is split:
            return None
        steered = steered.flatten(-2) if self.heads else steered
        if self.side == "input":
            self.envoy.input = steered
        else:
            self.envoy.output = steered if isinstance(raw, torch.Tensor) else (steered, *raw[1:])
        return None


def follow(base: Any, taps: list[Tap], run: Pass) -> None:
    """The body of the edit: visit the taps in every forward pass of one trace or generation."""
    for step in Iterations()[:]:
        try:
            args, kwargs = base.inputs
        except OutOfOrderError:
            # the generation is over: the loop asked for a pass that never came
            if step == 0:
                raise
            return
        call = call_shape(args, kwargs)
        run.begin(call["shape"], past=call["past"], mask=call["mask"], device=call["device"], continues=step > 0)
        before = None
        for tap in taps:
            before = tap.run(run, before)
