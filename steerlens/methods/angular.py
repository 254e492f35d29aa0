"""Angular steering: set the state's angle in a plane."""

from __future__ import annotations

import torch
from torch import Tensor

from steerlens.core import Controller, Loop, Site
from steerlens.core.law import finite
from steerlens.core.types import Layers, Where
from steerlens.fit.card import Card
from steerlens.fit.contrast import Pairs
from steerlens.fit.method import method
from steerlens.fit.reading import contrast_means, every_layer
from steerlens.fit.retune import Draft, Retune, edited
from steerlens.hosts.types import Model
from steerlens.laws.rotation import Turn


def _retune(draft: Draft) -> None:
    angle = finite("angle_rad", draft.arguments["angle_rad"])
    draft.laws(lambda law, loop: edited(law, angle_rad=angle, adaptive=bool(draft.arguments["adaptive"])))


@method(
    card=Card(needs="sets", points=("resid_pre", "resid_mid")),
    paper={"strength": 1.0},
    retune=Retune(("angle_rad", "adaptive"), _retune),
)
def angular(
    model: Model,
    data: Pairs,
    *,
    angle_rad: float = 0.0,
    read_layer: int | None = None,
    layers: Layers = None,
    adaptive: bool = False,
    strength: float = 0.1,
    where: Where = "all",
    paper: bool = False,
) -> Controller:
    """Rotate the state within a plane to a given angle from the feature's direction, without changing its norm.

        u = s (|P x| (cos(theta) b1 + sin(theta) b2) - P x),   P = b1 b1' + b2 b2'

    b1 is the mean difference of one layer, b2 the first principal component of the mean differences of all layers,
    made orthogonal to b1. The angle is set, not added to: 0 points along the feature, pi against it, and at pi / 2 it
    is absent.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model.
        data: Contrast texts; `Pairs.read` selects the token whose activation is used.
        angle_rad: theta, in radians; the paper's grid is 0, 10, ... 350 degrees.
        read_layer: After which block b1 is read; default: the block whose direction has the largest mean cosine with
            those of the other blocks.
        layers: Where to act: before the attention and before the MLP of each; default all.
        adaptive: Rotate only states that have the feature, `<b1, x> > 0`.
        strength: s, the fraction of the way at each site; only 1 (the paper) sets the angle and keeps the norm. The
            default has a KL of about 0.3 nats per token on SmolLM2, 1 one of 0.8 to 1.6.
        where: Token positions, see `Loop`.
        paper: Take the paper's strength, if none is given.

    Returns:
        Up to two loops per layer, on one plane. Recorded signals: `angle_rad` `[batch pos]`, the angle in the plane
        before, in radians from b1 towards b2, between -pi and pi; `u`; `u_norm`; with `adaptive`, `gate` `[batch pos]`,
        1 if it acts, else 0.

    Raises:
        ValueError: a layer the model does not have; sides that differ at fewer than two layers, or in the same
            direction at all of them.

    Without a refit, by `controller.retuned`: `angle_rad`, `adaptive`.

    Source: Vu and Nguyen (arXiv 2510.26243). The authors act on the outputs of the normalisation modules; here, as in
    IBM's port, on their inputs: the residual stream before attention and before the MLP.
    """
    source = [Site(number, "resid_post") for number in range(model.n_layers)]
    before = [point for point in ("resid_pre", "resid_mid") if point in model.points()]
    acted = every_layer(model, layers)
    sites = [Site(number, point) for number in acted for point in before]
    model.check(sites)
    asked = None if read_layer is None else every_layer(model, read_layer)[0]
    positive, negative = contrast_means(model, data, source)
    difference = {site.layer: positive[site].double() - negative[site].double() for site in source}
    known = [number for number, value in difference.items() if value.norm() > 0]
    if len(known) < 2 or (asked is not None and asked not in known):
        raise ValueError(
            f"both sides differ at layers {known} only; angular needs two such layers, and read_layer={read_layer}"
        )
    directions = torch.stack([difference[number] / difference[number].norm() for number in known])
    cosines = (directions @ directions.T).mean(1)
    index = int(cosines.argmax()) if asked is None else known.index(asked)
    first, second = plane(directions, index)
    dtype = positive[source[0]].dtype
    law = Turn(torch.stack([first, second]).to(dtype), angle_rad, adaptive=adaptive)
    loops = [Loop(law, site, where=where, strength=strength) for site in sites]
    return Controller(loops, {"read_layer": known[index]})


def plane(directions: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """An orthonormal pair: the given row, and the first principal component of all rows made orthogonal to it."""
    first = directions[index]
    _, values, components = torch.linalg.svd(directions - directions.mean(0), full_matrices=False)
    second = components[0] - (components[0] @ first) * first
    if min(values[0], second.norm()) < 1e-6:
        raise ValueError("the directions of all layers are the same, so that they span no plane")
    # a principal component has no sign, but angles between 0 and 180 degrees need one: its largest entry is positive
    return first, second / second.norm() * torch.sign(second[second.abs().argmax()])
