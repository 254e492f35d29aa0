"""Representation engineering: a reading vector by principal components."""

from __future__ import annotations

import torch
from torch import Tensor

from steerlens.core import POINTS, Controller, Loop
from steerlens.core.types import Layers, Where
from steerlens.fit.card import Card
from steerlens.fit.contrast import Pairs
from steerlens.fit.method import method
from steerlens.fit.reading import Scale, contrast_states, mean_norm, pick_layers
from steerlens.hosts.types import Model
from steerlens.laws.feedback import Add


@method(
    card=Card(needs="pairs", points=POINTS),
    paper={"scale": "absolute", "strength": 1.0},
)
def repe(
    model: Model,
    data: Pairs,
    *,
    layers: Layers = None,
    point: str = "resid_post",
    strength: float = 0.25,
    scale: Scale = "relative",
    where: Where = "last",
    paper: bool = False,
) -> Controller:
    """Add the first principal component of the differences within pairs.

        u = s a v,   v = argmax_|v|=1 sum_i <v, d_i - mean d>^2,   d_i = x(p_i+) - x(p_i-),   <v, mean d> >= 0
        a = mean |x| over all texts, or 1 with scale="absolute"

    The differences are centred, so that v is the direction in which the pairs differ most from each other. It may be
    far from the mean difference of `caa`. A principal component has no sign; it is oriented towards the mean
    difference.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model.
        data: Contrast pairs, three at least; `Pairs.read` selects the token whose activation is x.
        layers: Where to add; default the middle layer.
        point: Point of the block, see `Site`.
        strength: s, the share of a state's norm that is added, no unit; with `scale="absolute"` in activation units.
        scale: `"relative"` or `"absolute"`, see `strength`. v has unit length, so that 1 in activation units, as in
            the paper's equation, is next to nothing where states are large.
        where: Token positions, see `Loop`.
        paper: Take `scale="absolute"` and strength 1, if they are not given.

    Returns:
        One loop per layer. The recipe holds, per layer, the share of the variance that v explains and its cosine with
        the mean difference: near 0 the sign is arbitrary. Recorded signals: `u`, `u_norm`.

    Raises:
        ValueError: a layer or point the model does not have; sides of different number, fewer than three pairs, or
            the same difference in all pairs.

    Source: Zou et al. (arXiv 2310.01405). The authors leave the sign to the solver or to labelled data; with the
    solver's, half of all models are steered backwards.
    """
    sites = pick_layers(model, layers, point, default="middle")
    loops, shares, cosines = [], [], []
    for site, (positive, negative) in contrast_states(model, data, sites).items():
        v, share, cosine = principal_difference(positive.flatten(1), negative.flatten(1))
        vector = v.to(positive.dtype).reshape(positive.shape[1:])
        size = mean_norm(torch.cat([positive, negative])) if scale == "relative" else 1.0
        loops.append(Loop(Add(vector * size), site, where=where, strength=strength))
        shares.append(share)
        cosines.append(cosine)
    return Controller(loops, {"explained": shares, "cosine_with_mean": cosines})


def principal_difference(positive: Tensor, negative: Tensor) -> tuple[Tensor, float, float]:
    """First component of the differences of two `[n d]`, oriented; its share of variance; its cosine with the mean."""
    difference = positive.double() - negative.double()
    mean = difference.mean(0)
    if len(difference) < 3:
        raise ValueError(f"repe needs three pairs to centre and decompose; there are {len(difference)}")
    _, values, vectors = torch.linalg.svd(difference - mean, full_matrices=False)
    if values[0] <= 1e-12 * difference.norm():
        raise ValueError("all pairs have the same difference, so that there is no principal component; use caa")
    v = vectors[0]
    along = v @ mean
    # a component orthogonal to the mean keeps the sign that makes its largest entry positive
    sign = torch.sign(along) if along else torch.sign(v[v.abs().argmax()])
    cosine = float(along.abs() / mean.norm().clamp(min=1e-30))
    return sign * v, float(values[0].square() / values.square().sum()), cosine
