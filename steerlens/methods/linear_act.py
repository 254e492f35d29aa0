"""Linear activation transport, coordinate by coordinate."""

from __future__ import annotations

from torch import Tensor

from steerlens.core import POINTS, Controller, Loop
from steerlens.core.types import Layers, Where
from steerlens.fit.card import Card
from steerlens.fit.contrast import Pairs
from steerlens.fit.method import method
from steerlens.fit.reading import contrast_states, pick_layers
from steerlens.hosts.types import Model
from steerlens.laws.affine import Stretch

#: Keeps a coordinate that never varies in the negative texts at slope 0, as in the authors' code.
RIDGE = 1e-10


@method(card=Card(needs="sets", points=POINTS))
def linear_act(
    model: Model,
    data: Pairs,
    *,
    layers: Layers = None,
    point: str = "resid_post",
    strength: float = 1.0,
    where: Where = "all",
) -> Controller:
    """Move each coordinate's distribution over the negative texts onto that over the positive ones.

        u = s (w * x + b - x)
        w = sum_i x+_(i) x-_(i) / sum_i x-_(i)^2,   b = m+ - w m-

    with x_(i) the i-th smallest value of a coordinate over a side's texts, minus the side's mean m: the linear map that
    fits the optimal transport of one dimension, which joins equal ranks.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model.
        data: Contrast texts, the negative ones the source and the positive ones the target; if the sides have different
            numbers of texts, the last ones of the longer side are left out. `Pairs.read` selects the activation, in the
            paper the mean over tokens (`read="mean"`).
        layers: Where to act; default the middle layer.
        point: Point of the block, see `Site`.
        strength: s, the fraction of the way; no unit. 1 is the transport.
        where: Token positions, see `Loop`. Position 0, whose activation no text resembles, is left alone.

    Returns:
        One loop per layer. Recorded signals: `u`, `u_norm`.

    Raises:
        ValueError: a layer or point the model does not have; fewer than two texts on a side, as one has no spread.

    Source: Linear-AcT of Rodriguez et al. (arXiv 2410.23054), each layer fitted on unsteered activations. ODESteer's
    code for it ignores the strength.
    """
    sites = pick_layers(model, layers, point, default="middle")
    loops = []
    for site, (positive, negative) in contrast_states(model, data, sites).items():
        slope, shift = rank_regression(positive, negative)
        law = Stretch(slope.to(positive.dtype), shift.to(positive.dtype))
        loops.append(Loop(law, site, where=where, strength=strength))
    return Controller(loops)


def rank_regression(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and shift of the linear map between the sorted values of each coordinate; sides `[n ...]`, float64."""
    n = min(len(positive), len(negative))
    if n < 2:
        raise ValueError(f"linear_act needs two texts on each side; there are {len(positive)} and {len(negative)}")
    target, source = positive[:n].double(), negative[:n].double()
    to, start = target.mean(0), source.mean(0)
    ranked, given = (target - to).sort(0).values, (source - start).sort(0).values
    slope = (ranked * given).sum(0) / (given.square().sum(0) + RIDGE)
    return slope, to - slope * start
