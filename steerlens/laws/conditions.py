"""The conditions that several methods share: what a prompt or a token must be like for a loop to act, and how much."""

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
        score = height(pooled[0], self.direction, self.threshold)
        return (score > 0).to(score.dtype), {"score": score}


class Ramp(Condition):
    """A strength linear in a score, within bounds: `clip(offset + slope (<x, direction> - threshold), low, high)`.

    Args:
        direction: `[d]`.
        threshold: `[]`.
        slope: Per unit of the score.
        offset: Strength at the threshold, no unit.
        low, high: Least and largest strength, no unit; None: no bound.

    Signals: `score` `[batch]`, `<x, direction> - threshold`, in activation units if the direction is a unit vector.
    """

    signals = ("score",)

    def __init__(
        self,
        direction: Tensor,
        threshold: Tensor,
        slope: float,
        offset: float = 0.5,
        low: float | None = 0.0,
        high: float | None = 1.0,
    ):
        self.direction = direction
        self.threshold = threshold
        self.slope = slope
        self.offset = offset
        self.low = low
        self.high = high
        self.validate()

    def validate(self) -> None:
        """The bounds are in order."""
        if self.low is not None and self.high is not None and not self.low <= self.high:
            raise ValueError(f"low={self.low} and high={self.high}; the least strength is not above the largest")

    def decide(self, pooled: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """One summary `[batch d]`."""
        score = height(pooled[0], self.direction, self.threshold)
        strength = self.offset + self.slope * score
        strength = strength if self.low is None else strength.clamp(min=self.low)
        return (strength if self.high is None else strength.clamp(max=self.high)), {"score": score}


class Probability(Condition):
    """A strength that is the probability of a logistic probe: `1 / (1 + exp(-(<x, direction> - threshold)))`.

    Args:
        direction: `[d]`, in logits per activation unit.
        threshold: `[]`, in logits.

    Signals: `score` `[batch]`, the logit `<x, direction> - threshold`.
    """

    signals = ("score",)

    def __init__(self, direction: Tensor, threshold: Tensor):
        self.direction = direction
        self.threshold = threshold

    def decide(self, pooled: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """One summary `[batch d]`."""
        score = height(pooled[0], self.direction, self.threshold)
        return torch.sigmoid(score), {"score": score}


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


def height(x: Tensor, direction: Tensor, threshold: Tensor) -> Tensor:
    """`<x, direction> - threshold`, `[batch ...], [d], [] -> [batch]`."""
    return x.flatten(1) @ direction - threshold


def resemblance(x: Tensor, c: Tensor) -> Tensor:
    """`cos(x, tanh(c <c, x> / <c, c>))`, `[batch d], [d] -> [batch]`."""
    projected = torch.tanh((x @ c)[:, None] * c / (c @ c))
    return torch.nn.functional.cosine_similarity(x, projected, dim=-1)
