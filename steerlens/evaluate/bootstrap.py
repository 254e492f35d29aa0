"""Intervals by a bootstrap over items; items of two arms are drawn together, tokens never apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import torch
from torch import Tensor

RESAMPLES = 2000


def draws(n: int, *, resamples: int = RESAMPLES, seed: int = 0) -> Tensor:
    """Indices of items drawn with replacement, `[resample n]`."""
    return torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))


def mean_interval(
    values: Tensor, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """An interval for the mean over items, `[item] -> (low, high)`; give differences for a paired one."""
    means = values.double()[draws(len(values), resamples=resamples, seed=seed)].mean(1)
    return ends(means, len(values), level)


def interval(
    statistic: Callable[[Tensor], float], n: int, *, level: float = 0.95, resamples: int = 500, seed: int = 0
) -> tuple[float, float]:
    """An interval for a statistic of items that are given by their indices `[item]`."""
    found = [statistic(chosen) for chosen in draws(n, resamples=resamples, seed=seed)]
    return ends(torch.tensor(found, dtype=torch.float64), n, level)


def ends(found: Tensor, n: int, level: float) -> tuple[float, float]:
    """The percentile interval of a bootstrap, expanded for n items.

    With few items a percentile interval is too short: its variance lacks n/(n-1), its quantiles are the normal's. The
    expanded one reads the percentiles at `Phi(+-sqrt(n/(n-1)) t_{n-1})`. Source: Hesterberg (2015, arXiv 1411.5279).
    """
    found = found[found.isfinite()]
    if n < 2 or not len(found):
        return math.nan, math.nan
    tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * student((1 + level) / 2, n - 1))
    low, high = found.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def student(probability: float, freedom: int) -> float:
    """A quantile of Student's t, by its expansion around the normal one; within 0.2 % from 5 degrees of freedom on."""
    z, v = NormalDist().inv_cdf(probability), float(freedom)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / v**power for power, term in enumerate(terms, start=1))
