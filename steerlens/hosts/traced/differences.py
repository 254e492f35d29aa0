"""Tangents through the blocks without derivatives; sent to servers by source, so it names no module of ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Step of a central difference as a share of |x|: the error is of order step^2 + rounding / step.
STEP = 3e-3
#: For a 16-bit model, whose rounding is of order 1e-2.
WIDE_STEP = 1e-1


class Probe:
    """One block whose tangents are wanted.

    Args:
        t: Its number.
        vectors: Directions before it, `[m d]`.
        start: The first of its 2 m rows in the batch.
        before: Where its input can be read and moved.
        branch: Where the move is added once more, if `before` reaches attention only; else None.
        after: Where its output is.
    """

    def __init__(self, t: int, vectors: Tensor, start: int, before: Any, branch: Any, after: Any):
        self.t = t
        self.vectors = vectors
        self.start = start
        self.before = before
        self.branch = branch
        self.after = after


def differences(probes: list[Probe], step: float) -> dict[int, Tensor]:
    """`v @ A_t'` for directions v before each block, `[m d]` each, in the trace that is running.

    All rows of the batch are one text. Before block t the rows of its directions are moved by `+-h v` at the last
    token, and compared after the block; what becomes of them in later blocks is not looked at.
    """
    found = {}
    for probe in probes:
        raw = probe.before.raw()
        x = probe.before.state(raw)
        count = len(probe.vectors)
        plus, minus = slice(probe.start, probe.start + count), slice(probe.start + count, probe.start + 2 * count)
        wide = torch.promote_types(x.dtype, torch.float32)
        v = probe.vectors.to(x.device, wide)
        h = step * torch.linalg.vector_norm(x[probe.start, -1].to(wide))
        moved = x.clone()
        moved[plus, -1] += (h * v).to(x.dtype)
        moved[minus, -1] -= (h * v).to(x.dtype)
        # what the block gets: in a narrow dtype not quite what was asked
        width = ((moved[plus, -1].to(wide) - moved[minus, -1].to(wide)) * v).sum(-1, keepdim=True)
        probe.before.write(probe.before.replaced(raw, moved))
        if probe.branch is not None:
            raw = probe.branch.raw()
            probe.branch.write(probe.branch.replaced(raw, probe.branch.state(raw) + (moved - x)))
        y = probe.after.value()[:, -1].to(wide)
        found[probe.t] = (y[plus] - y[minus]) / width
    return found
