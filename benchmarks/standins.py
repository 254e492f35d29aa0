"""What cheaper stand-ins for the second pass of `origin="own"` lose.

python benchmarks/standins.py                       # sentiment, SmolLM2: about six minutes on one core
python benchmarks/standins.py --task ocean --items 0   # only how well the reference is predicted

The reference is the feature <v_t, x_t> of the same token without steering. Printed is, for each stand-in, which share
of its variance over the tokens of ordinary text remains unexplained, and what `lqr` with that stand-in reaches on
held-out items at a KL of 0.3 nats per token, with the paired interval against the second pass.

mean of texts: the negative texts' mean, one number a layer (`origin="negative"`); nothing: `origin="zero"`.
prompt's mean: of the tokens of the prompt, which are not steered (a second pass over the prompt alone).
from below: a linear predictor from the token's own feature at the layer below, fitted on ordinary text. The state at
    that layer is steered, so that the prediction is carried on from the embedding, which is not.
A running mean of the feature over earlier tokens is in the first table only: those tokens are steered, and a mean of
steered features minus the level asks for no further shift, whatever the shift is.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common  # noqa: F401 (first, as it sets the environment)

import torch  # isort: skip
from feedback import LIMIT, MODELS, Study, interval, measured
from torch import Tensor

import steerlens as sl
from steerlens.core import Controller, Law, Loop, Now, Signals, Summary
from steerlens.evaluate import propensity
from steerlens.fit.contrast import tokenize
from steerlens.fit.shipped import shipped, shipped_texts
from steerlens.hosts import host_of


class FromPrompt(Law):
    """Let a law see the deviation from the mean of the unsteered prompt: `u = law(x - mean)`."""

    law: Any

    def __init__(self, law: Law):
        self.law = law

    @property
    def signals(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of the law."""
        return self.law.signals

    def act(self, x: Tensor, now: Now) -> tuple[Tensor, Signals]:
        """`u = law(x - mean)`"""
        return self.law.act(x - now.summary[:, None], now)


class FromBelow(Law):
    """Let a law see the deviation from a feature that is predicted layer by layer: `r_t = a r_{t-1} + b`.

    Args:
        law: Feedback on one direction v.
        slope, offset: a and b, `[]`; at the first layer the feature itself is r.
        first: Whether this is the first layer.
    """

    law: Any

    def __init__(self, law: Law, slope: Tensor, offset: Tensor, first: bool):
        self.law = law
        self.slope = slope
        self.offset = offset
        self.first = first

    @property
    def signals(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of the law."""
        return self.law.signals

    def act(self, x: Tensor, now: Now) -> tuple[Tensor, Signals]:
        """`u = law(x - r v)`"""
        v = self.law.setpoint.basis[0]
        feature = (x @ v)[..., None]
        predicted = feature if self.first else self.slope * now.layers["predicted"] + self.offset
        now.layers["predicted"] = predicted
        return self.law.act(x - predicted * v, now)


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


def with_law(controller: Controller, change: Any) -> Controller:
    """The same gains and levels, with another law about them and no second pass."""
    return Controller([change(number, loop, loop.law.law) for number, loop in enumerate(controller.loops)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--task", default="sentiment")
    parser.add_argument("--folder", type=Path, default=Path("feedback"))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--items", type=int, default=16)
    parser.add_argument("--texts", type=int, default=16, help="plain sentences for the predictors")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    given.folder.mkdir(parents=True, exist_ok=True)
    study = Study(MODELS[given.model](), given.task, given.folder, prompts=given.prompts)
    options = {"linearization": study.plant, "progress": False}

    def own(level: float) -> Controller:
        return sl.lqr(study.model, study.dev, level=level, **options)

    fitted = own(1.0)
    bases = [loop.law.law.setpoint.basis[0] for loop in fitted.loops]
    assert len(bases) == study.depth, "every layer has a direction"
    features = ordinary(study, bases, given.texts)
    slope, offset = predictors(features)
    shares = unexplained(features, slope, offset)
    thirds = [range(n * study.depth // 3, (n + 1) * study.depth // 3) for n in range(3)]
    print(f"\nshare of the reference's variance that is not explained, {given.task}: lower, middle, upper third")
    for name, share in shares.items():
        print(f"  {name:14} " + " ".join(f"{float(share[third].mean()):.2f}" for third in thirds))
    if not given.items:
        return

    def prompt_mean(number: int, loop: Loop, law: Law) -> Loop:
        summary = Summary(loop.sense)
        return Loop(FromPrompt(law), loop.act, loop.sense, where=loop.where, summary=summary)

    def from_below(number: int, loop: Loop, law: Law) -> Loop:
        changed = FromBelow(law, slope[number], offset[number], number == 0)
        return Loop(changed, loop.act, loop.sense, where=loop.where)

    makers = {
        "second pass": (3.0, own),
        "nothing": (3.0, lambda s: sl.lqr(study.model, study.dev, level=s, origin="zero", **options)),
        "mean of texts": (3.0, lambda s: sl.lqr(study.model, study.dev, level=s, origin="negative", **options)),
        "prompt's mean": (3.0, lambda s: with_law(own(s), prompt_mean)),
        "from below": (3.0, lambda s: with_law(own(s), from_below)),
    }
    meter = propensity(shipped(study.task, split="held_out")[: given.items])
    plain = measured(study, meter, None)
    print(f"\n{given.task}, held out, {given.items} items, at a KL of {LIMIT} on {given.prompts} dev prompts")
    best: Tensor | None = None
    for name, (dial, make) in makers.items():
        change = measured(study, meter, study.at_limit(name, dial, make)) - plain
        best = change if best is None else best
        print(f"  {name:14} {interval(change)}   against the second pass {interval(change - best)}", flush=True)


if __name__ == "__main__":
    main()
