"""Attention heads: which of them separate two sides, and by how much to shift them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steerlens.core import Site
from steerlens.core.progress import bar
from steerlens.fit.logistic import linear_probe


def head_accuracy(positive: Tensor, negative: Tensor, *, held_out: float, seed: int) -> Tensor:
    """Accuracy `[head]` on held-out texts of a logistic regression per head; sides `[n head d_head]`."""
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for side in (positive, negative):
        if len(side) < 2:
            raise ValueError(f"iti needs two texts on each side; there are {len(positive)} and {len(negative)}")
        order = torch.randperm(len(side), generator=generator)
        size = min(max(1, round(held_out * len(side))), len(side) - 1)
        test.append(side[order[:size]])
        train.append(side[order[size:]])
    labels, truth = (torch.cat([torch.ones(len(a)), torch.zeros(len(b))]) for a, b in (train, test))
    seen, unseen = torch.cat(train).double(), torch.cat(test).double()
    scores = []
    for head in bar(range(seen.shape[1]), desc="probing heads"):
        weights, intercept = linear_probe(seen[:, head], labels)
        scores.append(((unseen[:, head] @ weights + intercept > 0) == (truth > 0)).double().mean())
    return torch.stack(scores)


def head_shift(
    positive: Tensor, negative: Tensor, heads: Sequence[int], *, direction: str = "mean", site: Site | None = None
) -> Tensor:
    """`sigma_h v_h` of the given heads, 0 elsewhere, `[head d_head]`; sides `[n head d_head]`."""
    everything = torch.cat([positive, negative]).double()
    vector = torch.zeros_like(everything[0])
    labels = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))])
    for head in heads:
        if direction == "mean":
            v = positive[:, head].double().mean(0) - negative[:, head].double().mean(0)
        else:
            v = linear_probe(everything[:, head], labels)[0]
        if v.norm() == 0:
            raise ValueError(f"both sides have identical activations in head {head} at {site}; choose fewer heads")
        vector[head] = scaled(v / v.norm(), everything[:, head])
    return vector.to(positive.dtype)


def scaled(v: Tensor, states: Tensor) -> Tensor:
    """A unit direction times the standard deviation of the states `[n d]` along it."""
    return v * (states @ v).std()
