"""Directional ablation."""

from __future__ import annotations

from typing import Literal

from steerlens.core import Controller, Loop, Site
from steerlens.core.types import Layers, Where
from steerlens.fit.card import Card
from steerlens.fit.contrast import Pairs
from steerlens.fit.method import method
from steerlens.fit.reading import contrast_means, every_layer, pick_layers, unit
from steerlens.hosts.types import Model
from steerlens.laws.feedback import Project


@method(
    card=Card(needs="sets", points=("resid_pre", "resid_mid", "resid_post")),
)
def ablation(
    model: Model,
    data: Pairs,
    *,
    read_layer: int | None = None,
    layers: Layers = None,
    origin: Literal["zero", "negative"] = "zero",
    strength: float = 1.0,
    where: Where = "all",
) -> Controller:
    """Remove one direction from the residual stream, at every layer.

        u = s (<v, r> - <v, x>) v,   v = unit mean difference at `read_layer`

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model.
        data: Contrast texts; the positive ones show what is to be removed.
        read_layer: Where the direction is read (after the block); default the middle layer.
        layers: Where it is removed: before the first of them, and after attention and after the MLP of each; default
            all.
        origin: `"zero"` (the paper: r = 0) or `"negative"` (r = mean of the negative texts at the site: the direction
            becomes neutral instead of absent; neutral text often has a projection far from 0).
        strength: s, the fraction removed; no unit.
        where: Token positions, see `Loop`. The paper removes it at every position; here position 0 is left alone unless
            you pass `slice(0, None)`.

    Returns:
        Up to two loops per layer. Recorded signals: `u`, `u_norm`, `projection` (before removal, in activation units).

    Raises:
        ValueError: an unknown origin; a layer the model does not have; sides with identical activations at
            `read_layer`.

    Source: Arditi et al. (arXiv 2406.11717), who ablate every write to the residual stream; ablating the stream after
    each write is the same for r = 0.
    """
    (source,) = pick_layers(model, read_layer, "resid_post", default="middle")
    acted = every_layer(model, layers)
    after = [point for point in ("resid_mid", "resid_post") if point in model.points()]
    sites = [Site(acted[0], "resid_pre"), *(Site(number, point) for number in acted for point in after)]
    read = {source, *sites} if origin == "negative" else {source}
    positive, negative = contrast_means(model, data, sorted(read))
    direction = unit(positive[source] - negative[source], source)
    loops = []
    for site in sites:
        reference = negative[site] if origin == "negative" else direction * 0
        law = Project(direction[None], reference)
        loops.append(Loop(law, site, where=where, strength=strength))
    return Controller(loops, {"read_layer": source.layer})
