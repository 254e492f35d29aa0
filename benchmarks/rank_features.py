"""Which ranking finds the feature that steers: the first feature of each, at one side effect.

python benchmarks/rank_features.py --tasks ocean wedding sentiment anger

Features are ranked on the dev half of a shipped set. The first feature that is more active in the positive texts, with
a positive score, is steered along its decoder row at every token, with the strength at which the mean KL is 0.3 nats a
token on dev prompts. What is printed is how much likelier the wanted text becomes than the unwanted one, on the
held-out half, in nats per token, with a 95 % bootstrap interval over its items; and the paired difference to the first
feature by effect. The last row is the mean difference at the same layer and KL.
"""

from __future__ import annotations

import argparse
import warnings
from typing import get_args

import common  # noqa: F401 (first, as it sets the environment)

import torch  # isort: skip

import steerlens as sl
from steerlens.evaluate import Arm, Bench, kl, propensity
from steerlens.fit.shipped import shipped, shipped_texts
from steerlens.models import smollm2, smollm2_sae
from steerlens.sae.reading import Ranking


def run(model: object, sae: object, task: str, prompts: int, items: int) -> None:
    """One task: a row a ranking, and one for the mean difference."""
    pairs = shipped(task, split="dev", read="mean")
    effect = propensity(shipped(task, split="held_out")[:items])
    chosen = shipped_texts("prompts", split="dev")[:prompts]
    bench = Bench(model, chosen)
    unsteered = torch.tensor(effect(bench, Arm("unsteered", None)))

    def changed(push: sl.Controller) -> tuple[torch.Tensor, float]:
        found = sl.calibrate(model, push, chosen, budget=kl(tokens=8) <= 0.3, tolerance=0.1, progress=False)
        return torch.tensor(effect(bench, Arm("steered", found.controller))) - unsteered, found.value

    known: dict[int, tuple[torch.Tensor, float]] = {}
    baseline = None
    for by in get_args(Ranking):
        table = sl.sae.rank_features(model, sae, pairs, by=by)
        first = table[(table["score"] > 0) & (table["effect"] > 0)].iloc[0]
        index = int(first.name)
        if index not in known:
            row = sae.W_dec[index].detach().float()  # type: ignore[attr-defined]
            known[index] = changed(sl.add(row / row.norm(), layer=15, where="all", strength=10.0))
        change, reached = known[index]
        baseline = change if baseline is None else baseline
        where = f"on in {first['on_positive']:4.0%} / {first['on_negative']:4.0%} of the texts"
        report(task, f"{by}, feature {index}", change, baseline, reached, where)
    change, reached = changed(sl.caa(model, pairs, layers=15, where="all"))
    assert baseline is not None
    report(task, "mean difference", change, baseline, reached, "")


def report(task: str, name: str, change: torch.Tensor, baseline: torch.Tensor, reached: float, more: str) -> None:
    """A row of the table."""
    low, high = interval(change)
    paired = change - baseline
    difference = (
        ""
        if not paired.any()
        else "  to effect {:+.3f} [{:+.3f}, {:+.3f}]".format(float(paired.mean()), *interval(paired))
    )
    steered = f"{float(change.mean()):+.3f} [{low:+.3f}, {high:+.3f}]  KL {reached:.2f}"
    print(f"{task:10} {name:22} {steered}{difference}  {more}", flush=True)


def interval(values: torch.Tensor, draws: int = 2000) -> tuple[float, float]:
    """Percentile bootstrap of the mean over items, 95 %."""
    picks = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = torch.quantile(values.double()[picks].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(low), float(high)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["ocean", "wedding", "sentiment", "anger"])
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--items", type=int, default=24)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    loaded, autoencoder = smollm2(), smollm2_sae()
    for each in given.tasks:
        run(loaded, autoencoder, each, given.prompts, given.items)
