"""Contrastive activation addition."""

from __future__ import annotations

from typing import Literal

from steerlens.core import POINTS, Controller, Loop
from steerlens.core.types import Layers, Where
from steerlens.fit.card import Card
from steerlens.fit.contrast import Pairs
from steerlens.fit.method import method
from steerlens.fit.reading import contrast_means, pick_layers, unit
from steerlens.hosts.types import Model
from steerlens.laws.along import Amplify, Push
from steerlens.laws.feedback import Add

#: Form -> law.
FORMS = {"add": Add, "projection": Amplify, "piecewise": Push}


@method(card=Card(needs="sets", points=POINTS))
def caa(
    model: Model,
    data: Pairs,
    *,
    layers: Layers = None,
    point: str = "resid_post",
    strength: float = 1.0,
    form: Literal["add", "projection", "piecewise"] = "add",
    normalize: bool = False,
    where: Where = "last",
) -> Controller:
    """Add the mean difference of the activations of two sets of texts.

        u = s v,               v = mean_i x(p_i+) - mean_i x(p_i-)
        u = s <v, x>/|x| v     form="projection"
        u = s sgn(<v, x>) v    form="piecewise"

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model.
        data: Contrast texts; `Pairs.read` selects the token whose activation is x.
        layers: Where to add; default the middle layer. `"all"`, or a list, adds the same s times each layer's own v:
            a small s at every layer achieves more at the same KL than a large one at the middle, see
            `docs/closed_loop.md`; in a model of 30 layers s = 0.05 has the KL of s = 1 at one.
        point: Point of the block, see `Site`.
        strength: s, in multiples of the class difference; no unit.
        form: `"add"` is the method. The two other forms are baselines of COLD-Steer. They push the state further in
            the direction along v in which it already lies: `"projection"` in proportion to its cosine with v,
            `"piecewise"` by v itself, with sgn(0) = -1 as in COLD-Steer.
        normalize: Use v / |v|, so that s is in activation units.
        where: Token positions, see `Loop`. The paper adds at the last prompt token and every generated one.

    Returns:
        One loop per layer. Recorded signals: `u`, `u_norm`; with the two other forms also `projection` `[batch pos]`,
        <v, x> over |v|, in activation units.

    Raises:
        ValueError: an unknown form; a layer or point the model does not have; sides with identical
            activations at a layer.

    Source: Rimsky et al. (arXiv 2312.06681). The vectors of one behaviour are used as they are; the authors rescale
    them to the mean norm over the behaviours that they study. The other forms are DiffMeanProj and DiffMeanPW of
    COLD-Steer (arXiv 2603.06495), whose code divides the projection by the norm of all states of a batch together, so
    that a token's control depends on the length of the text and of the other texts; here it is the token's own norm.
    """
    sites = pick_layers(model, layers, point, default="middle")
    positive, negative = contrast_means(model, data, sites)
    loops = []
    for site in sites:
        v = positive[site] - negative[site]
        direction = unit(v, site)
        loops.append(Loop(FORMS[form](direction if normalize else v), site, where=where, strength=strength))
    return Controller(loops)
