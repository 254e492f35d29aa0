"""Does it pay to leave out layers at which the classes are closer than ordinary text is spread, or to weigh them down?

    python benchmarks/separated.py --tasks ocean sentiment --folder runs

Prints, for each layer, the class difference over the standard deviation of `<v, x>` over the tokens of neutral texts.
Then controllers that act at all layers, at separated ones only (ratio of at least the threshold), and at all with their
control multiplied by `min(1, ratio)`: all at a KL of 0.3 on dev prompts, scored on the other half of the set in nats
per token by which the wanted text has become likelier than the unwanted one. For each method its gaps are to `caa` and
to the method itself at every layer.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common  # noqa: F401 (first, as it sets the environment)

import torch  # isort: skip

from budget import MODELS, jacobians
from equal import Field, ordinary, read_best
from torch import Tensor

import steerlens as sl
from steerlens.core import Controller, Site
from steerlens.fit.shipped import shipped_texts
from steerlens.hosts import host_of


def separations(model: Any, pairs: sl.Pairs) -> Tensor:
    """The class difference over the spread of neutral text, before each block and after the last, `[layer+1]`."""
    vectors = [loop.law.vector for loop in sl.caa(model, pairs, layers="all").loops]
    sites = [Site(t, "resid_post") for t in range(host_of(model).n_layers)]
    states = ordinary(model, shipped_texts("neutral", split="dev"), sites)
    found = [0.0]
    for site, v in zip(sites, vectors, strict=True):
        along = states[site] @ (v / v.norm())
        found.append(float(v.norm() / along.std()))
    return torch.tensor(found)


def weighted(controller: Controller, weights: Sequence[float]) -> Controller:
    """Each loop's control times the weight of the place where its direction was read; none of weight 0."""
    loops = []
    for loop in controller.loops:
        weight = weights[loop.sense.layer if loop.sense.point == "resid_pre" else loop.sense.layer + 1]
        if weight:
            loops.append(loop.replace(strength=loop.strength * weight))
    return Controller(loops, controller.recipe)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--tasks", nargs="+", default=["ocean", "sentiment"])
    parser.add_argument("--methods", nargs="+", default=["lqr", "caa", "lqr, paper", "pid, paper"])
    parser.add_argument("--threshold", type=float, default=1.0)
    parser.add_argument("--split", default="held_out")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--items", type=int, default=16)
    parser.add_argument("--folder", type=Path, default=Path("separated"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    given.folder.mkdir(parents=True, exist_ok=True)
    model = MODELS[given.model]()
    plant = jacobians(model, given.folder)
    for task in given.tasks:
        pairs = read_best(task, "dev")
        ratios = separations(model, pairs)
        print(f"\n{task}: class difference over spread, before each block and after the last")
        print("  " + " ".join(f"{ratio:.2f}" for ratio in ratios), flush=True)
        field = Field(model, task, given.folder, prompts=given.prompts, items=given.items, split=given.split)
        field.score("caa", sl.caa(model, pairs), 1.1, "strength")
        for name in given.methods:
            method, _, paper = name.partition(", ")
            loop: dict[str, Any] = {"paper": bool(paper)} if method != "caa" else {"layers": "all", "strength": 0.1}
            if method == "lqr":
                loop |= {"linearization": plant, "progress": False}
            controller = getattr(sl, method)(model, pairs, **loop)
            start, dial = (0.1, "strength") if method == "caa" else (0.3 if paper else 2.0, "level")
            whole, field.found = field.found, {"caa": field.found["caa"]}
            field.score(f"{name}, every layer", controller, start, dial)
            kept = (ratios >= given.threshold).float().tolist()
            if any(kept):
                field.score(f"{name}, separated", weighted(controller, kept), 1.3 * start, dial)
            field.score(f"{name}, weighed", weighted(controller, ratios.clamp(max=1).tolist()), 1.3 * start, dial)
            field.found |= whole
