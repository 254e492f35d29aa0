"""How well each layer and point separates two sets of texts: a cheap first measurement of where to steer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steerlens.core import Site
from steerlens.core.types import Figure, Frame, Layers
from steerlens.diagnose.result import curves, frame
from steerlens.evaluate.bootstrap import draws, ends
from steerlens.fit.contrast import Pairs
from steerlens.fit.reading import check_contrast, every_layer
from steerlens.hosts import host_of
from steerlens.hosts.types import Model


@dataclass(frozen=True)
class Separation:
    """Of each site, on texts that the direction was not fitted on.

    Separable is not steerable: a direction that separates the sides need not change what the model writes. Measure that
        with `sweep`.

    Attributes:
        sites: Layers and points.
        auc: Probability that a positive text lies further along the direction than a negative one, `[site]`.
        low, high: An interval for it, `[site]`.
        d: Difference of the means along the direction in units of the pooled standard deviation, `[site]`.
        size: |v| / mean |x|, the class difference relative to the state, `[site]`.
    """

    sites: tuple[Site, ...]
    auc: Tensor
    low: Tensor
    high: Tensor
    d: Tensor
    size: Tensor

    def table(self) -> Frame:
        """One row a site, a pandas DataFrame."""
        columns = {name: getattr(self, name) for name in ("auc", "low", "high", "d", "size")}
        places = {"layer": [site.layer for site in self.sites], "point": [site.point for site in self.sites]}
        return frame({"site": [str(site) for site in self.sites], **places, **columns}, "site")

    def best(self) -> Site:
        """The site with the largest difference in standard deviations."""
        return self.sites[int(self.d.nan_to_num(-1.0).argmax())]

    def plot(self) -> Figure:
        """AUC by layer, one line a point."""
        lines = {}
        for point in dict.fromkeys(site.point for site in self.sites):
            own = [index for index, site in enumerate(self.sites) if site.point == point]
            lines[point] = ([self.sites[index].layer for index in own], self.auc[own])
        return curves(lines, title="Separation of held-out texts", x="layer", y="AUC")


def separation(
    model: Model,
    data: Pairs,
    *,
    layers: Layers = None,
    points: Sequence[str] = ("resid_post",),
    folds: int = 2,
    level: float = 0.95,
    resamples: int = 500,
    seed: int = 0,
    batch: int = 16,
) -> Separation:
    """How far apart the two sides of contrast texts lie along their mean difference, at each layer and point.

        v = mean x+ - mean x-    on the other folds,    score = <v, x>    on this fold

    The texts are read once for all sites.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model, or a host such as `steerlens.remote(model)`.
        data: Contrast texts; `Pairs.read` selects the activation of a text.
        layers: Default all.
        points: Points of each block.
        folds: Into how many parts the texts are split; text i of either side is in part `i % folds`, so a pair stays
            together.
        level, resamples, seed: Of the interval, a bootstrap over texts.
        batch: Texts in one forward pass.

    Raises:
        TypeError, ValueError: No `Pairs`; fewer texts on a side than folds; a layer or point that is not there.
    """
    check_contrast(data)
    host = host_of(model)
    if folds < 2 or min(len(data.positive), len(data.negative)) < 2 * folds:
        raise ValueError(
            f"{len(data.positive)} positive and {len(data.negative)} negative texts in {folds} folds; each fold needs "
            "two of either side, and there are at least two folds"
        )
    sites = sorted(Site(layer, point) for layer in every_layer(host, layers) for point in points)
    host.check(sites)
    states = [host.read(side.tokens, side.weights, sites, batch=batch) for side in data.sides(host)]
    rows = [_separate(states[0][site], states[1][site], folds, level, resamples, seed) for site in sites]
    return Separation(tuple(sites), *torch.tensor(rows, dtype=torch.float64).T)


def _separate(positive: Tensor, negative: Tensor, folds: int, level: float, resamples: int, seed: int) -> list[float]:
    """AUC, its interval, d and relative size at one site."""
    sides = [side.flatten(1).double() for side in (positive, negative)]
    scores = [torch.zeros(len(side), dtype=torch.float64) for side in sides]
    for fold in range(folds):
        out = [torch.arange(len(side)) % folds == fold for side in sides]
        v = sides[0][~out[0]].mean(0) - sides[1][~out[1]].mean(0)
        v = v / v.norm().clamp(min=torch.finfo(torch.float64).tiny)
        for score, side, own in zip(scores, sides, out, strict=True):
            score[own] = side[own] @ v
    wins = _wins(*scores)
    drawn = [draws(len(score), resamples=resamples, seed=seed + number) for number, score in enumerate(scores)]
    found = torch.stack([wins[rows][:, columns].mean() for rows, columns in zip(*drawn, strict=True)])
    low, high = ends(found, min(map(len, scores)), level)
    spread = ((scores[0].var() + scores[1].var()) / 2).sqrt()
    d = float((scores[0].mean() - scores[1].mean()) / spread)
    size = float((sides[0].mean(0) - sides[1].mean(0)).norm() / torch.cat(sides).norm(dim=1).mean())
    return [float(wins.mean()), low, min(high, 1.0), d, size]


def _wins(positive: Tensor, negative: Tensor) -> Tensor:
    """1 if a positive score is above a negative one, 1/2 if they are equal, `[positive negative]`."""
    gap = positive[:, None] - negative[None]
    return (gap > 0).double() + 0.5 * (gap == 0).double()
