"""Training losses on the completions of a few examples, as functions of a model's logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from steerlens.fit.contrast import Pairs, Text, tokenize
from steerlens.fit.reading import check_contrast
from steerlens.hosts import Host

#: Loss -> which texts of a pair it needs.
SIDES = {"dpo": "both", "negative_sft": "negative", "sft": "positive"}


class Labelled:
    """A text whose tokens from `start` on are labels.

    Args:
        tokens: Token ids of prompt and completion.
        start: Index of the first label, at least 1.
    """

    def __init__(self, tokens: list[int], start: int):
        self.tokens = tokens
        self.start = start

    def weights(self) -> list[float]:
        """1 at the token that predicts the first label, else 0."""
        return [float(position == self.start - 1) for position in range(len(self.tokens))]

    def log_probability(self, logits: Tensor) -> Tensor:
        """Mean log probability of the labels, `[pos vocab] -> []`, in float32 at least."""
        stop = len(self.tokens)
        labels = torch.as_tensor(self.tokens[self.start :], device=logits.device)
        predicted = logits[self.start - 1 : stop - 1]
        predicted = predicted.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        return predicted.gather(-1, labels[:, None]).mean()


class Objective:
    """A loss of each example as a function of the mean log probabilities of its labels.

    Args:
        name: For a controller's recipe.
        sides: `"positive"`, `"negative"` or `"both"`: the texts that it needs.
        loss: `(l+, l-) -> [example]`; the side that is not needed is None.
    """

    def __init__(self, name: str, sides: str, loss: Callable[[Any, Any], Tensor]):
        self.name = name
        self.sides = sides
        self.loss = loss

    def __call__(self, logits: Tensor, texts: Sequence[Labelled]) -> Tensor:
        """Losses of the examples, `[text pos vocab] -> [example]`; with two texts an example they alternate."""
        levels = mean_levels(logits, texts)
        chosen = {"positive": levels, "negative": None, "both": levels[::2]}[self.sides]
        rejected = {"positive": None, "negative": levels, "both": levels[1::2]}[self.sides]
        losses = self.loss(chosen, rejected)
        expected = (len(texts) // (2 if self.sides == "both" else 1),)
        if losses.shape != expected:
            raise ValueError(f"loss {self.name} returned shape {tuple(losses.shape)}, not one number for each example")
        return losses


class Preference:
    """The loss of reference-free preference steering: the pair is preferred under +v, and the other way round under -v.

        L = -log sigmoid(b+ l+(v) - l-(v)) - log sigmoid(b- l-(-v) - l+(-v))
        b+ = max(L-(0) - L+(0), 1),   b- = max(L+(0) - L-(0), 1)

    with l the mean and L the sum of the log probabilities of the labels, so that the side which the unsteered model
    finds unlikely weighs more. Source: Wu et al. (arXiv 2505.20809).
    """

    name = "preference"
    sides = "both"

    def __call__(self, plain: Tensor, ahead: Tensor, back: Tensor, texts: Sequence[Labelled]) -> Tensor:
        """Losses of the examples, from the logits `[text pos vocab]` without a vector, with v and with -v."""
        counts = torch.tensor([len(text.tokens) - text.start for text in texts], device=plain.device)
        sums = mean_levels(plain, texts).detach() * counts
        margin = sums[::2] - sums[1::2]
        forth, opposed = mean_levels(ahead, texts), mean_levels(back, texts)
        wanted = logsigmoid((-margin).clamp_min(1) * forth[::2] - forth[1::2])
        unwanted = logsigmoid(margin.clamp_min(1) * opposed[1::2] - opposed[::2])
        return -wanted - unwanted


def mean_levels(logits: Tensor, texts: Sequence[Labelled]) -> Tensor:
    """Mean log probability of the labels of each text, `[text pos vocab] -> [text]`."""
    return torch.stack([text.log_probability(row) for text, row in zip(texts, logits, strict=True)])


def objective(loss: Any, *, beta: float, reference: str | None, others: Sequence[str] = ()) -> Objective:
    """The loss of a name, see `cold_kernel`, or of a callable; `others` are names that the caller knows besides.

    Raises:
        ValueError: an unknown name or reference.
    """
    if reference not in (None, "self"):
        raise ValueError(f"reference={reference!r}; it is None or 'self'")
    if callable(loss):
        return Objective(getattr(loss, "__name__", type(loss).__name__), "both", loss)
    if loss not in SIDES:
        raise ValueError(f"loss={loss!r}; it is one of {', '.join([*SIDES, *others])} or a function of (l+, l-)")

    def dpo(chosen: Tensor, rejected: Tensor) -> Tensor:
        margin = chosen - rejected
        # the reference is the model itself: its margin has the same value and no gradient
        margin = margin - margin.detach() if reference == "self" else margin
        return -logsigmoid(beta * margin)

    losses = {"dpo": dpo, "negative_sft": lambda _, rejected: rejected, "sft": lambda chosen, _: -chosen}
    return Objective(loss, SIDES[loss], losses[loss])


def labelled(data: Pairs, host: Host, sides: str) -> list[Labelled]:
    """The texts that a loss needs, those of a pair one after the other.

    Raises:
        TypeError: `data` is not `Pairs`.
        ValueError: unequal numbers of texts or two different prompts in a pair if both sides are needed; a text without
            a prompt token or without a label; a chat whose prompt is no prefix of it.
    """
    check_contrast(data)
    if sides == "both":
        if len(data.positive) != len(data.negative):
            raise ValueError(f"pairs are needed; there are {len(data.positive)} and {len(data.negative)} texts")
        for index, pair in enumerate(zip(data.positive, data.negative, strict=True)):
            if _prompt(pair[0]) != _prompt(pair[1]):
                raise ValueError(
                    f"pair {index} has two different prompts: {_prompt(pair[0])!r} and {_prompt(pair[1])!r}"
                )
        texts = [text for pair in zip(data.positive, data.negative, strict=True) for text in pair]
    else:
        texts = data.positive if sides == "positive" else data.negative
    found = []
    for text in texts:
        tokens, start = tokenize(text, host, data.prepend_bos, split=True)
        if start >= len(tokens):
            raise ValueError(f"{text!r} has no label tokens; give (prompt, completion) with a completion")
        if start < 1:
            raise ValueError(f"{text!r} has no prompt token before its completion; nothing predicts the first label")
        found.append(Labelled(tokens, start))
    return found


def _prompt(text: Text) -> Any:
    if isinstance(text, tuple):
        return text[0]
    # a chat's prompt is all but the answer; a text without a completion is recognised by its missing labels
    return text[:-1] if isinstance(text, list) and isinstance(text[0], dict) else None
