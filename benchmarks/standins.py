"""How well cheaper stand-ins for the second pass of `origin="own"` predict what it measures.

python benchmarks/standins.py                # sentiment, SmolLM2: about a minute on one core
python benchmarks/standins.py --task ocean

The reference is the feature <v_t, x_t> of the same token without steering. Printed is, for each stand-in, which share
of its variance over the tokens of ordinary text remains unexplained; 1 is what a constant leaves.

mean of texts: one number a layer. prompt's mean: the mean over the first half of a text, for the tokens of the second.
running mean: over all earlier tokens. from below: a linear predictor from the token's own feature at the layer below,
carried on from the embedding, since the states in between are steered.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

import common  # noqa: F401 (first, as it sets the environment)

import torch  # isort: skip
from budget import MODELS
from feedback import Study
from torch import Tensor

import steerlens as sl
from steerlens.fit.contrast import tokenize
from steerlens.fit.shipped import shipped_texts
from steerlens.hosts import host_of


def ordinary(study: Study, bases: Sequence[Tensor], texts: int) -> list[Tensor]:
    """Features of the tokens of plain sentences, `[layer token]` for each sentence; position 0 is left out."""
    host = host_of(study.model)
    sites = [sl.Site(t, "resid_pre") for t in range(study.depth)]
    found = []
    for text in shipped_texts("neutral", split="dev")[:texts]:
        ids = tokenize(text, host)[0]
        states = host.states([ids], sites)
        found.append(torch.stack([states[site][0][1:].float() @ v for site, v in zip(sites, bases, strict=True)]))
    return found


def predictors(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Slope and offset of each layer's feature on that of the layer below, `[layer]`; of the first 0."""
    pooled = torch.cat(list(features), dim=1).double()
    mean = pooled.mean(1, keepdim=True)
    centred = pooled - mean
    slope = torch.zeros(len(pooled), dtype=torch.float64)
    slope[1:] = (centred[1:] * centred[:-1]).sum(1) / centred[:-1].square().sum(1)
    offset = mean[:, 0].clone()
    offset[1:] -= slope[1:] * mean[:-1, 0]
    return slope.float(), offset.float()


def unexplained(features: Sequence[Tensor], slope: Tensor, offset: Tensor) -> dict[str, Tensor]:
    """Variance of the reference around each stand-in over its variance, `[layer]`."""
    names = "mean of texts", "prompt's mean", "running mean", "from below"
    sums = {name: torch.zeros(len(slope)) for name in names}
    pooled = torch.cat(list(features), dim=1)
    total = pooled.var(dim=1, correction=0) * pooled.shape[1]
    sums["mean of texts"] = total.clone()
    count = 0
    for text in features:
        half = text.shape[1] // 2
        later = text[:, half:]
        count += later.shape[1]
        sums["prompt's mean"] += (later - text[:, :half].mean(1, keepdim=True)).square().sum(1)
        means = text.cumsum(1)[:, half - 1 : -1] / torch.arange(half, text.shape[1])
        sums["running mean"] += (later - means).square().sum(1)
        predicted = text[0]
        for t in range(len(text)):
            predicted = predicted if t == 0 else slope[t] * predicted + offset[t]
            sums["from below"][t] += (text[t] - predicted).square().sum()
    share = pooled.shape[1] / count
    return {
        name: value / total * (share if name in ("prompt's mean", "running mean") else 1)
        for name, value in sums.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--task", default="sentiment")
    parser.add_argument("--folder", type=Path, default=Path("feedback"))
    parser.add_argument("--texts", type=int, default=16, help="plain sentences for the predictors")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    given.folder.mkdir(parents=True, exist_ok=True)
    study = Study(MODELS[given.model](), given.task, given.folder, prompts=1)
    options = {"linearization": study.plant, "progress": False}

    fitted = sl.lqr(study.model, study.dev, **options)
    bases = [loop.law.law.setpoint.basis[0] for loop in fitted.loops]
    assert len(bases) == study.depth, "every layer has a direction"
    features = ordinary(study, bases, given.texts)
    slope, offset = predictors(features)
    shares = unexplained(features, slope, offset)
    thirds = [range(n * study.depth // 3, (n + 1) * study.depth // 3) for n in range(3)]
    print(f"\nshare of the reference's variance that is not explained, {given.task}: lower, middle, upper third")
    for name, share in shares.items():
        print(f"  {name:14} " + " ".join(f"{float(share[third].mean()):.2f}" for third in thirds))


if __name__ == "__main__":
    main()
