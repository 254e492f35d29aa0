"""Likelihoods and divergences on a server, where whole logits would be too much to send back.

A batch of 16 rows of 40 tokens has 126 MB of logits for a vocabulary of 49,152, and 16 kB of numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import nnsight
import torch
from torch import Tensor

from steerlens.hosts.batches import Row, pad_rows
from steerlens.hosts.traced.remote import backend
from steerlens.hosts.traced.scored import chosen, divergences

#: Called in a block as `steer(model, prompt_lengths=...)`; must be fit to be sent.
SteerHere = Callable[..., Any]


def likelihoods(host: Any, steer: SteerHere | None, rows: Sequence[Row], batch: int) -> list[Tensor]:
    """Log probability of each token of each completion, `[completion]` each, nats.

    Args:
        steer: `steerlens.apply` with a controller; None: unsteered.
    """
    model, found = host.model, []
    for part in _batches(rows, batch):
        ids, mask = _padded(host, part)
        lengths = [len(prompt) for prompt, _ in part]
        with (
            torch.no_grad(),
            model.trace(
                {"input_ids": ids, "attention_mask": mask}, backend=backend(model, host.remote, host.timeout_s)
            ),
        ):
            if steer is not None:
                steer(model, prompt_lengths=lengths)
            levels = nnsight.save(chosen(model.output.logits, ids).cpu())
        found += [
            levels[index, len(prompt) - 1 : len(prompt) - 1 + len(completion)]
            for index, (prompt, completion) in enumerate(part)
        ]
    return found


def kl_of_rows(
    host: Any, steer: SteerHere | None, rows: Sequence[Row], plain: Sequence[Row], batch: int
) -> list[list[float]]:
    """KL from the unsteered model at each token of each completion, both models in one request.

    Args:
        rows: As they are steered.
        plain: The same completions after the prompts of the unsteered model.
    """
    model, found = host.model, []
    for part in _batches(list(zip(rows, plain, strict=True)), batch):
        ids, mask = _padded(host, [row for pair in part for row in pair])
        steered_ids, steered_mask, plain_ids, plain_mask = ids[::2], mask[::2], ids[1::2], mask[1::2]
        lengths = [len(prompt) for (prompt, _), _ in part]
        starts = [length - 1 for length in lengths]
        plain_starts = [len(prompt) - 1 for _, (prompt, _) in part]
        counts = [len(completion) for (_, completion), _ in part]
        with torch.no_grad(), model.trace(backend=backend(model, host.remote, host.timeout_s)) as tracer:
            with tracer.invoke({"input_ids": plain_ids, "attention_mask": plain_mask}):
                p = model.output.logits
            with tracer.invoke({"input_ids": steered_ids, "attention_mask": steered_mask}):
                if steer is not None:
                    steer(model, prompt_lengths=lengths)
                q = model.output.logits  # awaited before p is named: only then has the first invoke its own
                values = nnsight.save(divergences(p, q, plain_starts, starts, counts))
        found += [value.tolist() for value in values]
    return found


def pass_over(host: Any, ids: Tensor, mask: Tensor) -> None:
    """A forward pass that brings back what is recorded in it and nothing else."""
    model = host.model
    where = backend(model, host.remote, host.timeout_s)
    with model.trace({"input_ids": ids, "attention_mask": mask}, backend=where):
        last = model.output.logits[0, -1, 0].save()
    del last


def _batches(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _padded(host: Any, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    return pad_rows([[*prompt, *completion] for prompt, completion in rows], host.device)
