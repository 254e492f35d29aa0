"""The conditions that several methods share: what a summary of the prompt must be like for a loop to act."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steerlens.core.prompt import Condition


class Side(Condition):
    """Open on one side of a hyperplane: `<x, direction> > threshold`.

    Args:
        direction: `[d]`.
        threshold: `[]`.

    Signals: `score` `[batch]`, `<x, direction> - threshold`, in activation units if the direction is a unit vector.
    """

    signals = ("score",)

    def __init__(self, direction: Tensor, threshold: Tensor):
        self.direction = direction
        self.threshold = threshold

    def decide(self, pooled: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """One summary `[batch d]`."""
        score = pooled[0] @ self.direction - self.threshold
        return (score > 0).to(score.dtype), {"score": score}


class Resemblance(Condition):
    """Open if any of several summaries resembles its direction, or does not, by the measure of CAST.

        similarity = cos(x, tanh(P x)),   P = c c' / <c, c>

    Args:
        directions: c, `[d]` each, one per summary.
        threshold: `[]`.
        above: Open if the similarity is above the threshold; otherwise if it is below.

    Signals: `similarity` `[batch]`, no unit, of the summary that is nearest to opening.
    """

    signals = ("similarity",)

    def __init__(self, directions: Sequence[Tensor], threshold: Tensor, above: bool = True):
        self.directions = list(directions)
        self.threshold = threshold
        self.above = above

    def decide(self, pooled: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """One summary `[batch d]` per direction."""
        found = torch.stack([resemblance(x, c) for x, c in zip(pooled, self.directions, strict=True)])
        similarity = found.amax(0) if self.above else found.amin(0)
        met = similarity > self.threshold if self.above else similarity < self.threshold
        return met.to(similarity.dtype), {"similarity": similarity}


def resemblance(x: Tensor, c: Tensor) -> Tensor:
    """`cos(x, tanh(c <c, x> / <c, c>))`, `[batch d], [d] -> [batch]`."""
    projected = torch.tanh((x @ c)[:, None] * c / (c @ c))
    return torch.nn.functional.cosine_similarity(x, projected, dim=-1)
