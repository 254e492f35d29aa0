"""How far the KL on one half of the shipped prompts is from that on the other, at given strengths.

    python benchmarks/budget_halves.py --prompts 92 caa=2.52 caa:layers=all=0.108 iti=1.22 mimic=1.1 sadi=1.25

A row a method: the mean KL on each half, their ratio, its standard error if prompts are drawn at random, the spread of
prompts, and its correlations with what is known before anything is steered. docs/evaluate.md has what it printed.
"""

from __future__ import annotations

import argparse

import torch

from steerlens.cli.task import fits_of, task_of
from steerlens.evaluate import Arm, Bench, kl
from steerlens.evaluate.bench import UNSTEERED
from steerlens.evaluate.meter import item_means
from steerlens.fit.shipped import shipped_texts
from steerlens.models import smollm2


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of two lists of numbers."""
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+", help="such as caa=2.5: a method and its strength")
    parser.add_argument("--concept", default="sentiment")
    parser.add_argument("--prompts", type=int, default=None, help="of each half; default all")
    given = parser.parse_args()
    torch.set_num_threads(1)
    halves = [shipped_texts("prompts", split=half)[: given.prompts] for half in ("dev", "held_out")]
    prompts = [text for both in zip(*halves, strict=False) for text in both]
    model, fit = smollm2(), task_of(given.concept, None, None, None).fit
    bench, meter = Bench(model, prompts), kl()
    rows = bench.continuations(prompts, 24)
    entropy = torch.tensor(
        bench.logits(
            UNSTEERED,
            rows,
            lambda _, logits: float(torch.distributions.Categorical(logits=logits[:-1]).entropy().mean()),
        ),
        dtype=torch.float64,
    )
    lengths = torch.tensor([len(prompt) for prompt, _ in rows], dtype=torch.float64)
    for text in given.methods:
        spec, _, strength = text.rpartition("=")
        ((name, build),) = fits_of([spec], model, fit, "last").items()
        found = item_means(meter(bench, Arm(name, build(), float(strength))))
        dev, held = float(found[::2].mean()), float(found[1::2].mean())
        spread = float(found.std() / found.mean())
        print(
            f"{name:18} {dev:.3f} and {held:.3f}, ratio {held / dev:.3f} +- {spread * (4 / len(found)) ** 0.5:.3f}; "
            f"spread {spread:.2f}; correlation with entropy {correlation(found, entropy):+.2f}, "
            f"with length {correlation(found, lengths):+.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
