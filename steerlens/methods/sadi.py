"""Semantics-adaptive dynamic intervention: scale the few elements that differ most between two sets of texts."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from steerlens.core import Controller, Law, Loop, Site, Summary
from steerlens.core.law import finite
from steerlens.core.types import Layers, Where
from steerlens.fit.card import Card
from steerlens.fit.contrast import Pairs
from steerlens.fit.method import method
from steerlens.fit.reading import contrast_means, every_layer
from steerlens.fit.retune import Draft, Retune, edited, ratio
from steerlens.hosts.types import Model
from steerlens.laws.scaling import Frozen, Scale

Component: TypeAlias = Literal["head", "neuron", "hidden"]

#: Component -> points of the block where its elements are; the first is the default.
POINTS: dict[Component, tuple[str, ...]] = {
    "head": ("z",),
    "neuron": ("mlp_post",),
    "hidden": ("mlp_out", "resid_post"),
}
#: Component -> default number of elements, from the middle of the paper's grids.
COUNTS = {"head": 4, "neuron": 50, "hidden": 10}


def _retune(draft: Draft) -> None:
    if draft.arguments["mode"] == "live":
        draft.scale("strength")
        return
    strength, old = finite("strength", draft.changes["strength"]), float(draft.before["strength"])
    ratio("strength", strength, old)
    draft.laws(lambda law, loop: edited(law, factors=1 + strength * (law.factors != 1).to(law.factors)))
    # as the fit does: frozen states of strength 0 are the unsteered ones, which is not the same as no steering
    off = strength == 0
    draft.loops = [loop.replace(strength=0.0 if off else loop.strength) for loop in draft.loops]


@method(
    card=Card(needs="sets", points=("z", "mlp_post", "mlp_out", "resid_post")),
    paper={"where": "last_prompt"},
    retune=Retune(("strength",), _retune),
)
def sadi(
    model: Model,
    data: Pairs,
    *,
    component: Component = "head",
    n_elements: int | None = None,
    strength: float = 4.0,
    select: Literal["max", "min", "abs"] = "max",
    normalize: Literal["layer_std"] | None = None,
    mode: Literal["live", "frozen"] = "live",
    layers: Layers = None,
    point: str | None = None,
    where: Where | None = None,
    paper: bool = False,
) -> Controller:
    """Scale those heads, neurons or coordinates by which the activations of two sets of texts differ most.

        u = s (m * x),   m = 1 on the k elements (layer, i) of largest D, else 0        mode="live"
        u = (1 + s m) * x0 - x,   x0 the unsteered state of the last prompt token       mode="frozen"
        D = mean_i x(p_i+) - mean_i x(p_i-),   for a head the mean of D over d_head

    The k elements are chosen over all layers jointly, by signed value; ties are broken by layer, then by index. What is
    added depends on the input's own activation: the elements are multiplied by `1 + s`. Frozen, the state of every
    layer, whether or not it has a chosen element, is set to its unsteered value with the elements multiplied, so that
    one scaled element does not reach another through the layers between.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model.
        data: Contrast texts; `Pairs.read` selects the token whose activation is x (paper: the last of question +
            answer).
        component: `"head"`: query heads at `z`, also in models that share keys and values. `"neuron"`: `mlp_post`.
            `"hidden"`: coordinates of `mlp_out`, as the authors' code has it, or of `resid_post` (see `point`).
        n_elements: k, the number of elements, at most as many as there are; default 4 heads, 50 neurons or 10
            coordinates.
        strength: s, no unit; delta in the paper. 0 is off in both modes. The authors' code calls `1 + s` the
            strength: 5 to 80 for heads.
        select: `"max"` (largest D), `"min"` (most negative D) or `"abs"`.
        normalize: None, as in the paper, which favours late layers, whose activations are larger; `"layer_std"` divides
            D by its standard deviation over the elements of its layer before ranking.
        mode: `"live"`, or `"frozen"` as in the authors' code, which costs a second pass over each prompt. A frozen
            controller that is multiplied by a factor moves the state by that fraction of the way to the frozen state,
            which contains s.
        layers: Layers to choose from; default all.
        point: For `"hidden"`: `"mlp_out"` (default) or `"resid_post"`.
        where: Token positions, see `Loop`; default `"last"`, and `"last_prompt"` with `mode="frozen"`, which needs it.
            The authors' code scales at the last prompt token alone, which has a KL of 0.01 nats per token on SmolLM2
            at the default strength, `"last"` one of about 0.3.
        paper: Take `where="last_prompt"`, if no positions are given.

    Returns:
        One loop per layer that has a chosen element, or for every layer with `mode="frozen"`. Recorded signals: `u`,
        `u_norm`, `share` (norm of `m * x` over norm of `x`, no unit; only with `mode="live"`).

    Raises:
        ValueError: `n_elements` below 1 or above the number of elements; an unknown component, point, `select`,
            `normalize` or `mode`; other tokens than the last prompt token if frozen; a layer the model does not have;
            both sides with identical activations everywhere.

    Source: Wang et al. (arXiv 2410.12299). Deviations from the authors' code: their neuron is act(gate) of a gated MLP.
    Scaling it and scaling `mlp_post`, act(gate) * up, are the same, but D here is that of `mlp_post`, so other neurons
    are chosen. Their head indices are wrong if a model has more layers than heads. Theirs is `mode="frozen"`; the
    paper's equation is `"live"`.
    """
    chosen_point = _point(component, point)
    if where is None:
        where = "last_prompt" if mode == "frozen" else "last"
    if mode == "frozen" and where != "last_prompt":
        raise ValueError(f"where={where!r}; frozen states are those of the last prompt token, where='last_prompt'")
    sites = [Site(layer, chosen_point) for layer in every_layer(model, layers)]
    model.check(sites)
    count = COUNTS[component] if n_elements is None else n_elements
    # heads are whole rows of [head d_head]; neurons and coordinates are single numbers
    total = len(sites) * model.shape(sites[0])[0]
    if not 1 <= count <= total:
        raise ValueError(f"n_elements={count}, but there are {total} {component} elements in {len(sites)} layers")
    positive, negative = contrast_means(model, data, sites)
    scores = torch.stack([positive[site] - negative[site] for site in sites])
    scores = scores.mean(-1) if component == "head" else scores
    if not scores.any():
        raise ValueError(
            f"both sides have identical activations at every {chosen_point}; do all texts end in the same token?"
        )
    mask = top_k(scores, count, select=select, normalize=normalize)
    loops = []
    for site, row in zip(sites, mask.to(scores.dtype), strict=True):
        row = row[:, None] if component == "head" else row
        if mode == "frozen":
            law: Law = Frozen(1 + strength * row)
            clean = Summary(site, where="last_prompt")
            loops.append(Loop(law, site, where=where, strength=0.0 if strength == 0 else 1.0, summary=clean))
        elif row.any():
            loops.append(Loop(Scale(row), site, where=where, strength=strength))
    return Controller(loops, {"n_elements": count, "point": chosen_point})


def top_k(
    scores: Tensor,
    k: int,
    *,
    select: Literal["max", "min", "abs"] = "max",
    normalize: Literal["layer_std"] | None = None,
) -> Tensor:
    """True at the k elements that rank first over all layers, `[layer n] -> [layer n]`; ties by layer, then index."""
    if normalize == "layer_std":
        spread = scores.std(dim=1, keepdim=True)
        # a layer whose elements do not differ has no ranking of its own
        scores = torch.where(spread > 0, scores / spread, 0.0)
    ranked = {"max": scores, "min": -scores, "abs": scores.abs()}[select]
    order = ranked.flatten().sort(descending=True, stable=True).indices[:k]
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order] = True
    return mask.view_as(scores)


def _point(component: Component, point: str | None) -> str:
    points = POINTS[component]
    if point is not None and point not in points:
        raise ValueError(f"point={point!r}; for component={component!r} it is one of {', '.join(points)}")
    return point or points[0]
