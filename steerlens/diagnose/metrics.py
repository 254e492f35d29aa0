"""Metrics of a steered pass: one number per prompt, from its logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from steerlens.hosts import host_of
from steerlens.hosts.types import Model

#: From the logits of one prompt, `[1 pos vocab]`, to one number.
Metric = Callable[[Tensor], Tensor]
#: One for all prompts, or one for each.
Metrics = Metric | Sequence[Metric]


class LogitDifference:
    """The logits of some tokens minus those of others, after a prompt's last token: `mean_a l_a - mean_b l_b`."""

    def __init__(self, a: Sequence[int], b: Sequence[int], name: str):
        self.a, self.b, self.name = list(a), list(b), name

    def __call__(self, logits: Tensor) -> Tensor:
        """`[batch pos vocab] -> [batch]`."""
        last = logits[:, -1].float() if logits.dtype.itemsize < 4 else logits[:, -1]
        return last[:, self.a].mean(-1) - last[:, self.b].mean(-1)

    def __repr__(self) -> str:
        return self.name


#: A token, as an id or as a string that is one token, or several.
Tokens: TypeAlias = int | str | Sequence[int | str]


def logit_difference(model: Model, a: Tokens, b: Tokens) -> LogitDifference:
    """The metric "logit of `a` minus logit of `b`" for the token after a prompt, in logits (natural log units).

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model, for its tokenizer.
        a, b: Each a token, as an id or as a string that is one token, mind the space before a word; or a list of
            tokens, whose logits are averaged.

    Raises:
        ValueError: a string that is not one token; the message shows its pieces.
    """
    tokenizer = host_of(model).tokenizer
    name = f"logit difference (logits): {_words(a)} minus {_words(b)}"
    return LogitDifference(_ids(a, tokenizer), _ids(b, tokenizer), name)


def metric_name(metrics: Metrics) -> str:
    """For a figure's axis."""
    metric = metrics if callable(metrics) else metrics[0]
    return metric.name if isinstance(metric, LogitDifference) else getattr(metric, "__name__", "metric")


def each_metric(metrics: Metrics, count: int) -> list[Metric]:
    """One metric a prompt.

    Raises:
        ValueError: the number of metrics is not the number of prompts.
    """
    if callable(metrics):
        return [metrics] * count
    if len(metrics) != count:
        raise ValueError(f"{len(metrics)} metrics for {count} prompts; give one for all, or one for each")
    return list(metrics)


def measure(metric: Metric, logits: Tensor) -> Tensor:
    """One number for each row, `[row pos vocab] -> [row]`; each row is shown to the metric alone.

    Raises:
        ValueError: the metric gives more than one number.
    """
    values = [metric(row[None]) for row in logits]
    for value in values:
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the metric gave {got} for logits of one prompt, [1 pos vocab]; it must give one number")
    return torch.stack([value.reshape(()) for value in values])


def _ids(side: Tokens, tokenizer: Any) -> list[int]:
    tokens = [side] if isinstance(side, (int, str)) else list(side)
    if not tokens:
        raise ValueError("an empty list names no token")
    return [_one(token, tokenizer) for token in tokens]


def _one(token: int | str, tokenizer: Any) -> int:
    if isinstance(token, int):
        return token
    if tokenizer is None:
        raise ValueError(f"{token!r} needs a tokenizer, which this model lacks; give a token id")
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        pieces = [tokenizer.decode([piece]) for piece in ids]
        raise ValueError(f"{token!r} is {len(ids)} tokens, {pieces}; give one, as ' {token.strip()}' with its space")
    return int(ids[0])


def _words(side: Tokens) -> str:
    return repr(side) if not isinstance(side, (list, tuple)) else " ".join(map(repr, side))
