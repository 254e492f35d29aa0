"""Numbers of logits, computed beside the model; sent to servers by source, so it names no module of ours."""

from __future__ import annotations

import torch
from torch import Tensor


def chosen(logits: Tensor, ids: Tensor) -> Tensor:
    """Log probability of each token after the first, `[row pos vocab] -> [row pos-1]`, nats, float32 at least."""
    wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    labels = ids[:, 1:].to(wide.device)
    return wide.gather(-1, labels[..., None])[..., 0] - wide.logsumexp(-1)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL from p to q, log-probabilities `[... vocab]` each, `[...]`, nats, float64."""
    return (p.exp() * (p - q)).sum(-1, dtype=torch.float64)


def divergences(p: Tensor, q: Tensor, p_starts: list[int], q_starts: list[int], counts: list[int]) -> list[Tensor]:
    """KL from p to q of the tokens of completions, `[row pos vocab]` each, nats.

    Args:
        p, q: Logits of the same completions after prompts of their own.
        p_starts, q_starts: For each row the position whose logits predict the completion's first token.
        counts: For each row the completion's length.
    """
    found = []
    for row in range(len(counts)):
        a, b = (logits[row, start : start + counts[row]] for logits, start in ((p, p_starts[row]), (q, q_starts[row])))
        wide = torch.promote_types(a.dtype, torch.float32)
        a, b = (logits.to(wide).log_softmax(-1) for logits in (a, b))
        found.append(divergence(a, b).cpu())
    return found
