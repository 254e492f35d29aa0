"""Mean activation transport."""

from __future__ import annotations

from steerlens.core import POINTS, Controller, Loop
from steerlens.core.types import Layers, Where
from steerlens.fit.card import Card
from steerlens.fit.contrast import Pairs
from steerlens.fit.method import method
from steerlens.fit.reading import contrast_means, pick_layers, unit
from steerlens.hosts.types import Model
from steerlens.laws.feedback import Add


@method(card=Card(needs="sets", points=POINTS))
def mean_act(
    model: Model,
    data: Pairs,
    *,
    layers: Layers = None,
    point: str = "resid_post",
    strength: float = 1.0,
    where: Where = "all",
) -> Controller:
    """Move the negative texts' mean activation onto the positive texts'.

        u = s (m+ - m-),   m = mean activation of a side

    the optimal transport between two distributions that differ by a shift. The vector is that of `caa`; the method
    differs in where it acts: at every token of the chosen layers.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model.
        data: Contrast texts, the negative ones the source and the positive ones the target; `Pairs.read` selects the
            activation, in the paper the mean over tokens (`read="mean"`).
        layers: Where to act; default the middle layer.
        point: Point of the block, see `Site`.
        strength: s, the fraction of the way; no unit. 1 is the transport.
        where: Token positions, see `Loop`.

    Returns:
        One loop per layer. Recorded signals: `u`, `u_norm`.

    Raises:
        ValueError: a layer or point the model does not have; sides with identical activations at a layer.

    Source: Mean-AcT of Rodriguez et al. (arXiv 2410.23054), each layer fitted on unsteered activations.
    """
    sites = pick_layers(model, layers, point, default="middle")
    positive, negative = contrast_means(model, data, sites)
    loops = []
    for site in sites:
        shift = positive[site] - negative[site]
        unit(shift, site)
        loops.append(Loop(Add(shift), site, where=where, strength=strength))
    return Controller(loops)
