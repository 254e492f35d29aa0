"""The KL of every method at its default strength, and the factor that would bring it to 0.3 nats per token.

python benchmarks/default_strengths.py --folder strengths                # every method on three shipped sets; resumable
python benchmarks/default_strengths.py --tasks ocean --methods caa repe --factors

Every method is fitted with its defaults on the dev half of a set, and with `paper=True` where its defaults are not the
published ones. The KL from the unsteered model is a mean over that model's own continuations of dev prompts. Gates are
held open, so that the number is that of the prompts which are steered. Concepts are read as a mean over the text, pairs
with completions as a mean over the completion; methods that need completions get those of concepts after a short
prompt, and `actadd` gets two short prompts.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import warnings
from pathlib import Path
from typing import Any

import common  # noqa: F401 (first, as it sets the environment)

import torch  # isort: skip

from budget import LIMIT, MODELS, divergence, jacobians
from equal import read_best

import steerlens as sl
from steerlens.core import Controller
from steerlens.evaluate import Bench
from steerlens.fit.method import declared
from steerlens.fit.shipped import shipped, shipped_texts
from steerlens.testing import discover_methods

#: What a concept's sentences complete, for methods that need a prompt.
PROMPT = "Here is a sentence. "
#: Two short prompts a set, for `actadd`.
WORDS = {"ocean": ("The ocean", "The office"), "wedding": ("A wedding", "A meeting"), "sentiment": ("Joy", "Anger")}


def texts(task: str, method: str) -> sl.Pairs:
    """The dev half of a set, as a method needs it."""
    known = declared(discover_methods()[method])
    assert known is not None
    if method == "actadd" and task in WORDS:
        return sl.Pairs([WORDS[task][0]], [WORDS[task][1]])
    pairs = shipped(task, split="dev")
    if known.card.needs == "completions" and not isinstance(pairs.positive[0], tuple):
        return sl.Pairs(*([(PROMPT, text) for text in side] for side in (pairs.positive, pairs.negative)))
    return read_best(task, "dev")


def fit(model: Any, task: str, method: str, paper: bool, plant: sl.Linearization) -> Controller:
    """A method with its defaults, or the paper's, its gates held open."""
    function = discover_methods()[method]
    known = inspect.signature(function).parameters
    options: dict[str, Any] = {"linearization": plant, "progress": False} if "linearization" in known else {}
    controller = function(model, texts(task, method), **options, **({"paper": True} if paper else {}))
    return Controller([loop.replace(gates=()) for loop in controller.loops], controller.recipe)


def factor_for(bench: Bench, controller: Controller, value: float, limit: float = LIMIT) -> tuple[float, float]:
    """The factor on every control at which the KL is the limit, and its KL, to 10 %, from the KL at factor 1."""
    factor, low, high = 1.0, 0.0, math.inf
    for _ in range(7):
        if abs(value / limit - 1) < 0.1:
            break
        low, high = (factor, high) if value < limit else (low, factor)
        # a small control has a KL that grows with its square
        guess = factor * min(max(math.sqrt(limit / max(value, 1e-9)), 1 / 8), 8.0)
        factor = guess if low < guess < high else (low + high) / 2
        value = divergence(bench, controller, factor)
    return factor, value


def run(model: Any, task: str, methods: list[str], folder: Path, *, prompts: int, factors: bool) -> None:
    """One task: a line a method, kept in a file."""
    file = folder / f"{task}.jsonl"
    lines = map(json.loads, file.read_text().splitlines() if file.exists() else ())
    done = {(line["method"], line["paper"]): line for line in lines}
    plant = jacobians(model, folder)
    bench = Bench(model, shipped_texts("prompts", split="dev")[:prompts])
    print(f"\n{task}: KL at the default strength, nats per token, {prompts} dev prompts", flush=True)
    for name in methods:
        published = "paper" in inspect.signature(discover_methods()[name]).parameters
        for paper in (False, True) if published else (False,):
            line = done.get((name, paper))
            if line is None or (factors and "factor" not in line):
                controller = fit(model, task, name, paper, plant)
                line = line or {"method": name, "paper": paper, "kl": divergence(bench, controller)}
                if factors:
                    line["factor"], line["kl_there"] = factor_for(bench, controller, line["kl"])
                with file.open("a") as out:
                    out.write(json.dumps(line) + "\n")
            beside = f"   factor {line['factor']:.3g} has {line['kl_there']:.2f}" if "factor" in line else ""
            print(f"  {name + (', paper' if paper else ''):20} {line['kl']:6.3f}{beside}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--tasks", nargs="+", default=["ocean", "wedding", "sentiment"])
    parser.add_argument("--methods", nargs="+", choices=list(discover_methods()), default=list(discover_methods()))
    parser.add_argument("--folder", type=Path, default=Path("strengths"))
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--factors", action="store_true", help="also look for the factor at which the KL is 0.3")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    given.folder.mkdir(parents=True, exist_ok=True)
    loaded = MODELS[given.model]()
    for each in given.tasks:
        run(loaded, each, given.methods, given.folder, prompts=given.prompts, factors=given.factors)
