"""Contrastive activation addition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steerlens.contrast import Pairs
from steerlens.core import Controller, Loop
from steerlens.fitting import contrast_means, pick_layers, recipe, resolve, unit
from steerlens.laws import Add


def caa(
    model: Any,
    data: Pairs,
    *,
    layers: int | Sequence[int] | None = None,
    point: str = "resid_post",
    strength: float = 1.0,
    normalize: bool = False,
    where: Any = "last",
) -> Controller:
    """Add the mean difference of the activations of two sets of texts.

        u = s v,   v = mean_i x(p_i+) - mean_i x(p_i-)

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model.
        data: Contrast texts; `Pairs.read` says which token's activation is x.
        layers: Where to add; default the middle layer. On several layers the same s is used at each.
        point: Point of the block, see `Site`.
        strength: s, in multiples of the class difference; no unit.
        normalize: Use v / |v|, so that s is in activation units.
        where: Token positions, see `Loop`. The paper adds at the last prompt token and every generated one.

    Returns:
        One loop per layer. Recorded signals: `u`, `u_norm`.

    Raises:
        ValueError: a layer or point the model does not have; texts that give no difference at a layer.

    Source: Rimsky et al. (arXiv 2312.06681). The vectors of one behaviour are used as they are; the authors rescale
    them to the mean norm over the behaviours that they study.
    """
    host = resolve(model)
    sites = pick_layers(host, layers, point, default="middle")
    positive, negative = contrast_means(host, data, sites)
    loops = []
    for site in sites:
        difference = positive[site] - negative[site]
        direction = unit(difference, site)
        vector = direction if normalize else difference
        loops.append(Loop(Add(vector), site, where=where, strength=strength, name="caa"))
    arguments = {"layers": [site.layer for site in sites], "point": point, "strength": strength, "normalize": normalize}
    return Controller(loops, recipe("caa", host, arguments, data=data))
