"""Which ranking finds the feature that steers: the first feature of each, at one side effect.

python benchmarks/rank_features.py --tasks ocean wedding sentiment anger

Features are ranked on the dev half of a shipped set. The first feature with a positive score is steered along its
decoder row at every token, with the strength at which the mean KL is 0.3 nats per token on dev prompts. What is printed
is how much likelier the wanted text becomes than the unwanted one, on the held-out half.
"""

from __future__ import annotations

import argparse
import warnings

import common  # noqa: F401 (first, as it sets the environment)

import torch  # isort: skip

import steerlens as sl
from steerlens.evaluate import Arm, Bench, kl, propensity
from steerlens.fit.shipped import shipped, shipped_texts
from steerlens.models import smollm2, smollm2_sae
from steerlens.sae.reading import RANKINGS


def run(model: object, sae: object, task: str, prompts: int, items: int) -> None:
    """One task: a row a ranking."""
    pairs = shipped(task, split="dev", read="mean")
    effect = propensity(shipped(task, split="held_out")[:items])
    known: dict[int, tuple[float, float]] = {}
    for by in RANKINGS:
        table = sl.sae.rank_features(model, sae, pairs, by=by)
        first = table[table["score"] > 0].iloc[0]
        index = int(first.name)
        if index not in known:
            row = sae.W_dec[index].detach().float()  # type: ignore[attr-defined]
            push = sl.add(row / row.norm(), layer=15, where="all", strength=10.0)
            chosen = shipped_texts("prompts", split="dev")[:prompts]
            found = sl.calibrate(model, push, chosen, budget=kl(tokens=8) <= 0.3, tolerance=0.1, progress=False)
            bench = Bench(model, chosen)
            change = torch.tensor(effect(bench, Arm("steered", found.controller))) - torch.tensor(
                effect(bench, Arm("unsteered", None))
            )
            known[index] = float(change.mean()), float(found.reached)
        steered, reached = known[index]
        print(
            f"{task:10} {by:12} feature {index:4}  on in {first['on_positive']:4.0%} of the positive and "
            f"{first['on_negative']:4.0%} of the negative texts   effect {steered:+.3f}   KL {reached:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["ocean", "wedding", "sentiment", "anger"])
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--items", type=int, default=12)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    loaded, autoencoder = smollm2(), smollm2_sae()
    for each in given.tasks:
        run(loaded, autoencoder, each, given.prompts, given.items)
