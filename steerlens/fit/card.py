"""What a method declares about itself in a form that can be checked: the facts of the README's table."""

from __future__ import annotations

from dataclasses import dataclass

from steerlens.core.sites import POINTS

#: Points whose state is one vector.
VECTORS = tuple(point for point in POINTS if point != "z")

NEEDS = {
    "texts": "texts to follow",
    "sets": "two sets of texts",
    "pairs": "pairs of texts",
    "completions": "pairs of prompt and completion",
}
DERIVATIVES = {
    "none": "no",
    "activations": "of a loss, to activations",
    "vectors": "of a loss, to added vectors",
    "blocks": "Jacobians of the blocks",
    "parameters": "of a loss, to parameters",
    "weights": "no, but reads weights",
}


@dataclass(frozen=True)
class Card:
    """What a method declares of itself. The conformance suite checks every field.

    Args:
        needs: The data, a key of `NEEDS`, for the method's defaults.
        points: Points of a block at which it acts, by default or on request.
        derivatives: What fitting differentiates, or what else it needs of the weights, a key of `DERIVATIVES`. With
            `"none"` a fit needs no weights on this machine.
        prompt_passes: Forward passes of a steered model at a prompt.
        token_passes: Forward passes at each generated token.
        concepts: Whether it also takes a list of `Pairs`, one for each concept.
        features: Whether it also takes features of autoencoders in place of the texts, one or a list of them.
        vectors: Whether it also takes directions of one's own in place of the texts.
        also: What else it needs, in words.

    Raises:
        ValueError: an unknown key or point.
    """

    needs: str
    points: tuple[str, ...]
    derivatives: str = "none"
    prompt_passes: int = 1
    token_passes: int = 1
    concepts: bool = False
    features: bool = False
    vectors: bool = False
    also: str = ""

    def __post_init__(self) -> None:
        for name, value, known in (("needs", self.needs, NEEDS), ("derivatives", self.derivatives, DERIVATIVES)):
            if value not in known:
                raise ValueError(f"{name}={value!r}; it is one of {', '.join(known)}")
        unknown = [point for point in self.points if point not in POINTS]
        if unknown or not self.points:
            raise ValueError(f"points={self.points}; they are of {', '.join(POINTS)}")
