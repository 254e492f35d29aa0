"""Defaults against each other and against the papers' settings, at one side effect.

python benchmarks/defaults.py --tasks ocean wedding sentiment --folder runs    # resumable: a file a task
python benchmarks/defaults.py --tasks ocean --arms caa lqr --prompts 8         # a quick look

Every method is fitted on the dev half of a shipped set, its level or strength is chosen on dev prompts so that the mean
KL is 0.3 nats per token, and what is printed is measured on the held-out half: how much likelier the wanted text has
become than the unwanted one, in nats per token, with the paired interval of its difference to one-layer CAA.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path

import common  # noqa: F401 (first, as it sets the environment)

import torch  # isort: skip

from budget import LIMIT, MODELS, at_limit, jacobians
from default_strengths import texts

import steerlens as sl
from steerlens.core import Controller
from steerlens.evaluate import Bench, kl, propensity
from steerlens.fit.shipped import shipped, shipped_texts

#: A method, its options, and what is turned until the budget is met: its level or its strength.
ARMS = {
    "caa": (sl.caa, {}, "strength"),
    "caa, every layer": (sl.caa, {"layers": "all"}, "strength"),
    "lqr": (sl.lqr, {"progress": False}, "level"),
    "lqr, dense": (sl.lqr, {"solver": "dense", "progress": False}, "level"),
    "lqr, paper": (sl.lqr, {"paper": True, "progress": False}, "level"),
    "lqr, negative": (sl.lqr, {"origin": "negative", "progress": False}, "level"),
    "pid": (sl.pid, {}, "level"),
    "pid, paper": (sl.pid, {"paper": True}, "level"),
    "pid_steering": (sl.pid_steering, {}, "strength"),
    "alphasteer": (sl.alphasteer, {}, "strength"),
    "hold": (sl.hold, {}, "level"),
    "hold, own": (sl.hold, {"origin": "own"}, "level"),
    "hold, probe": (sl.hold, {"direction": "probe"}, "level"),
    "trained_vector": (sl.trained_vector, {}, "strength"),
    "trained_vector, preference": (sl.trained_vector, {"loss": "preference"}, "strength"),
}
#: What the arm `prompt` asks for; it cannot be scaled and is measured as it is.
ASKED = {
    "sentiment": "Write gladly: everything was a delight.",
    "ocean": "Write about the ocean and the sea.",
    "wedding": "Write about a wedding.",
}


def controllers(model: object, plant: sl.Linearization, bench: Bench, pairs: sl.Pairs, name: str) -> Callable:
    """A function that fits an arm and sets its level."""
    method, options, dial = ARMS[name]
    if method is sl.lqr:
        options = options | {"linearization": plant}
    if dial == "strength":
        return lambda: method(model, pairs, **options)

    def fit() -> Controller:
        fitted = method(model, pairs, **options)
        return at_limit(bench, lambda level: fitted.retuned(level=level), 1.5, rounds=4)[0]

    fit.digest = f"{name} at a level with a KL of {LIMIT}"  # type: ignore[attr-defined]
    return fit


def run(model: object, task: str, names: list[str], folder: Path, *, prompts: int, items: int) -> None:
    """One task: compare, and print a row an arm."""
    pairs, completed = shipped(task, split="dev", read="mean"), texts(task, "trained_vector")
    held = shipped(task, split="held_out")[:items]
    plant = jacobians(model, folder)
    bench = Bench(model, shipped_texts("prompts", split="dev")[:prompts])
    found = sl.evaluate.compare(
        model,
        {
            name: controllers(model, plant, bench, completed if name.startswith("trained") else pairs, name)
            for name in names
            if name != "prompt"
        },
        propensity(held),
        budget=kl() <= LIMIT,
        prompts=shipped_texts("prompts", split="held_out")[: 2 * prompts],
        damage=[],
        baselines=[sl.evaluate.prompt(ASKED[task])] if "prompt" in names else (),
        file=folder / f"{task}.jsonl",
        progress=False,
    )
    print(f"\n{task}: wanted over unwanted, nats per token, at a KL of {LIMIT} (held out, {len(held.positive)} pairs)")
    strengths = {arm: strength for arm, strength in found.arms}
    for name in names:
        effect = float(found.change(name, strengths[name]).mean())
        line = f"  {name:26} {effect:+.3f}   KL {_cost(found, name, strengths):.2f}"
        if name != "caa" and "caa" in names:
            difference, low, high = found.difference(name, "caa")
            line += f"   against caa {difference:+.3f} ({low:+.3f} to {high:+.3f})"
        print(line, flush=True)


def _cost(found: sl.evaluate.Evaluation, name: str, strengths: dict[str, float]) -> float:
    values = found.values(name, strengths[name], "KL")
    return float(torch.tensor([sum(item) / len(item) for item in values]).mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--tasks", nargs="+", default=["ocean", "wedding", "sentiment"])
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, "prompt"], default=list(ARMS))
    parser.add_argument("--folder", type=Path, default=Path("defaults"))
    parser.add_argument("--prompts", type=int, default=12, help="for choosing; twice as many for reporting")
    parser.add_argument("--items", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    given.folder.mkdir(parents=True, exist_ok=True)
    loaded = MODELS[given.model]()
    for each in given.tasks:
        run(loaded, each, given.arms, given.folder, prompts=given.prompts, items=given.items)
