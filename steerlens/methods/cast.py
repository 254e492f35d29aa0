"""Conditional activation steering: a behaviour vector that is added only to prompts that resemble a condition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steerlens.core import POINTS, Controller, Gate, Loop, Site, Summary
from steerlens.core.types import Layers, Where
from steerlens.fit.card import Card
from steerlens.fit.contrast import Pairs
from steerlens.fit.method import method
from steerlens.fit.reading import check_paired, contrast_states, every_layer
from steerlens.gating import POOLS, Pool, prompt_states
from steerlens.hosts import Host
from steerlens.hosts.types import Model
from steerlens.laws.conditions import Resemblance, resemblance
from steerlens.laws.feedback import Add


@method(card=Card(needs="pairs", points=POINTS))
def cast(
    model: Model,
    data: Pairs,
    *,
    condition: Pairs | None = None,
    layers: Layers = None,
    gate_layers: Layers = None,
    point: str = "resid_post",
    pool: Pool = "mean",
    threshold: float | None = None,
    strength: float = 1.0,
    where: Where = "all",
) -> Controller:
    """Add a behaviour vector, but only to prompts that resemble a condition.

        u = g s v,   g = 1 if any_j sim(x_j, c_j) > b, else 0   (or < b, whichever separates the examples better)
        sim(x, c) = cos(x, tanh(c <c, x> / <c, c>)),   x_j the unsteered prompt's mean at condition layer j

    v and c are first principal components of the differences within pairs, of unit length, with the sign for which in
    most pairs the positive text has the larger projection. The decision is made once for each row of the batch and kept
    while tokens are generated.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model.
        data: Behaviour pairs for v; `Pairs.read` selects the token whose activation is x.
        condition: Pairs of prompts for c: positive ones to be steered, negative ones to be left alone. Default: those
            of `data`. They are read as prompts are when the gate decides.
        layers: Where v is added; default the middle third (the authors: 15 to 23 of 32).
        gate_layers: Where the prompt is measured; default the layer after the first fifth (the authors: 7 of 32). A
            layer after the first of `layers` costs a second pass over each prompt.
        point: Point of the block, see `Site`.
        pool: How the prompt is summarised: `"mean"` over all its tokens except the one at position 0, or `"last"`, its
            last token.
        threshold: b. Default: the threshold with the highest F1 score on `condition`, in the middle of the widest gap.
            Whether the gate is open above or below it is chosen by the score in both cases.
        strength: s, in activation units; v has unit length, so that 1 is a small change if activations are large.
        where: Token positions, see `Loop`. The paper adds to every token.

    Returns:
        One loop per layer. The recipe holds the threshold, its side and its F1 score: check it before you rely on
        the gate. Recorded signals: `u`, `u_norm`, `gate` (0 or 1), `similarity` (no unit).

    Raises:
        ValueError: sides of different number; pairs that do not differ; a layer or point the model does not have; an
            unknown `pool`; conditions that no threshold can separate.

    Source: Lee et al. (arXiv 2409.05907). Deviations from the authors' code: vectors are added, and prompts measured,
    at the point where they were fitted, not one layer later; every row of a batch has its own decision; layers before
    the last condition layer are steered in the prompt, too; the threshold is searched among all that separate the
    examples, not in a fixed range.
    """
    examples = data if condition is None else condition
    check_paired("cast's condition", examples)
    depth = model.n_layers
    sites = [
        Site(n, point)
        for n in every_layer(model, list(range(depth // 3, -(-2 * depth // 3))) if layers is None else layers)
    ]
    early = depth // 5 if gate_layers is None else gate_layers
    gates = [Site(n, point) for n in every_layer(model, early)]
    model.check([*sites, *gates])
    condition_met, f1 = _fit_condition(model, examples, gates, pool, threshold)
    gate = Gate(condition_met, [Summary(site, where=POOLS[pool]) for site in gates])
    loops = []
    for site, (positive, negative) in contrast_states(model, data, sites).items():
        v = pairwise_component(positive.flatten(1), negative.flatten(1), site)
        vector = v.to(positive.dtype).reshape(positive.shape[1:])
        loops.append(Loop(Add(vector), site, where=where, strength=strength, gates=(gate,)))
    return Controller(loops, {"threshold": condition_met.threshold, "above": condition_met.above, "f1": f1})


def pairwise_component(positive: Tensor, negative: Tensor, site: Site) -> Tensor:
    """First component of two `[n d]` whose rows are centred pair by pair, turned to the side of most positive rows."""
    difference = positive.double() - negative.double()
    _, values, vectors = torch.linalg.svd(difference, full_matrices=False)
    if not values[0]:
        raise ValueError(f"both sides have identical activations at {site}; do all texts end in the same token?")
    votes = torch.sign(difference @ vectors[0]).sum()
    # a tie keeps the sign of the mean difference
    sign = torch.sign(votes if votes else vectors[0] @ difference.mean(0))
    return vectors[0] * (sign if sign else 1)


def _fit_condition(
    host: Host, data: Pairs, sites: Sequence[Site], pool: str, threshold: float | None
) -> tuple[Resemblance, float]:
    """The condition fitted on pairs of prompts, and its F1 score on them."""
    positive, negative, directions = [], [], []
    for site, (a, b) in prompt_states(host, data, sites, pool).items():
        c = pairwise_component(a, b, site).to(a.dtype)
        directions.append(c)
        positive.append(resemblance(a, c))
        negative.append(resemblance(b, c))
    found = []
    for above in (True, False):
        sides = [torch.stack(rows).amax(0) if above else torch.stack(rows).amin(0) for rows in (positive, negative)]
        # below a threshold is above its negative
        sign = 1.0 if above else -1.0
        f1, gap, bound = _best_threshold(
            *(sign * side.double() for side in sides), threshold=threshold and sign * threshold
        )
        found.append((f1, gap, above, sign * bound))
    f1, _, above, bound = max(found, key=lambda entry: entry[:3])
    if f1 == 0:
        raise ValueError(
            "no threshold opens the gate for any positive prompt; are both sides of the condition the same?"
        )
    return Resemblance(directions, torch.tensor(bound, dtype=directions[0].dtype), above), f1


def _best_threshold(positive: Tensor, negative: Tensor, *, threshold: float | None) -> tuple[float, float, float]:
    """F1 score, width of the gap and threshold: the highest score, then the widest gap between two examples."""
    values = torch.cat([positive, negative]).unique()
    middles = ((values[1:] + values[:-1]) / 2).tolist() if threshold is None else [threshold]
    gaps = (values[1:] - values[:-1]).tolist() if threshold is None else [0.0]
    scored = []
    for bound, gap in zip(middles, gaps, strict=True):
        hits, false = int((positive > bound).sum()), int((negative > bound).sum())
        scored.append((2 * hits / (len(positive) + hits + false), gap, bound))
    return max(scored, default=(0.0, 0.0, 0.0))
