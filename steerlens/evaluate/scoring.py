"""Logits of texts that are given, as the steered model had them while it generated; the one place that scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar, overload

import torch
from torch import Tensor

from steerlens.core import Controller
from steerlens.core.progress import bar
from steerlens.hosts import Host, host_of
from steerlens.hosts.batches import pad_rows
from steerlens.hosts.types import Model
from steerlens.steering import steer

Kept = TypeVar("Kept")
#: From the number of a row and its scored logits `[completion+1 vocab]` to what is kept of them.
Reduce: TypeAlias = Callable[[int, Tensor], Kept]


@overload
def scored_logits(
    model: Model,
    controller: Controller | None,
    rows: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    *,
    strength: float = 1.0,
    batch: int = 16,
    reduce: None = None,
) -> list[Tensor]: ...
@overload
def scored_logits(
    model: Model,
    controller: Controller | None,
    rows: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    *,
    strength: float = 1.0,
    batch: int = 16,
    reduce: Reduce[Kept],
) -> list[Kept]: ...
def scored_logits(
    model: Model,
    controller: Controller | None,
    rows: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    *,
    strength: float = 1.0,
    batch: int = 16,
    reduce: Reduce[Kept] | None = None,
) -> list[Tensor] | list[Kept]:
    """Teacher-forced logits of completions, steered at the tokens that would be steered while generating.

    With `where="last"` these are the last prompt token and the completion's tokens.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model, or its host.
        controller: What steers; None scores the model as it is.
        rows: Token ids of each prompt and its completion, BOS included, without pads.
        prompt_lengths: How many tokens of each row are its prompt, at least 1.
        strength: Factor on every control.
        batch: Rows in one forward pass, padded on the right.
        reduce: Called with a row's index and logits; what it returns takes their place, so that not all logits of all
            rows are in memory at once.

    Returns:
        For each row `[completion+1 vocab]`, float32 at least: entry i predicts token i of the completion, the last one
        what would follow. Or what `reduce` made of it.

    Raises:
        ValueError: a row without a prompt token, or shorter than its prompt.
    """
    host = host_of(model)
    for index, (row, length) in enumerate(zip(rows, prompt_lengths, strict=True)):
        if not 1 <= length <= len(row):
            raise ValueError(
                f"row {index} has {len(row)} tokens and a prompt of {length}; a prompt has 1 to all of them"
            )
    found: dict[int, Any] = {}
    longest_first = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    for start in bar(range(0, len(rows), batch), desc="scoring texts"):
        chosen = longest_first[start : start + batch]
        given = [rows[index] for index in chosen]
        ids, mask = pad_rows(given, host.device)
        lengths = [prompt_lengths[index] for index in chosen]
        with torch.no_grad():
            logits = _logits(host, controller, ids, mask, lengths, strength)
        for position, index in enumerate(chosen):
            own = logits[position, lengths[position] - 1 : len(rows[index])]
            own = own.to(torch.promote_types(own.dtype, torch.float32))
            found[index] = own.clone() if reduce is None else reduce(index, own)
    return [found[index] for index in range(len(rows))]


def log_probabilities(logits: Tensor, completion: Sequence[int]) -> Tensor:
    """Log probability of each token of a completion, `[completion]`, in nats.

    Args:
        logits: Of a row, as `scored_logits` gives them, `[completion+1 vocab]`.
        completion: Its token ids.
    """
    labels = torch.as_tensor(list(completion), device=logits.device)
    return logits[: len(completion)].log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def _logits(
    host: Host, controller: Controller | None, ids: Tensor, mask: Tensor, lengths: Sequence[int], strength: float
) -> Tensor:
    if controller is None:
        return host.logits(ids, mask)
    with steer(host, controller, strength=strength, record=None) as run, run.scoring(lengths):
        return host.logits(ids, mask)
