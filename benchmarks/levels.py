"""The KL of methods whose unit is the class difference, at several levels or strengths, on several sets of texts.

    python benchmarks/levels.py --tasks ocean sentiment --methods lqr pid caa

Every method is fitted once on the dev half of a set, as `default_strengths.py` does, and its level or strength changed
by `retuned`. A row a method and a task; the KL is a mean over dev prompts, in nats per token.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import common  # noqa: F401 (first, as it sets the environment)

import torch  # isort: skip

from budget import MODELS, divergence, jacobians
from equal import read_best

import steerlens as sl
from steerlens.evaluate import Bench
from steerlens.fit.shipped import shipped, shipped_texts

TASKS = ("ocean", "wedding", "anger", "sentiment", "formality", "certainty", "compliance")
#: What is turned of each method, and the numbers tried.
DIALS: dict[str, tuple[str, tuple[float, ...]]] = {
    "lqr": ("level", (1.5, 2.0, 3.0)),
    "pid": ("level", (1.5, 2.0, 3.0)),
    "caa": ("strength", (1.0, 1.25, 1.5)),
    "mean_act": ("strength", (1.0, 1.25, 1.5)),
    "ablation": ("strength", (1.0,)),
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--methods", nargs="+", choices=DIALS, default=list(DIALS))
    parser.add_argument(
        "--read", default=None, help="what is read of the texts; default their completions, or the mean"
    )
    parser.add_argument("--folder", type=Path, default=Path("levels"))
    parser.add_argument("--prompts", type=int, default=12)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    given.folder.mkdir(parents=True, exist_ok=True)
    model = MODELS[given.model]()
    plant = jacobians(model, given.folder)
    bench = Bench(model, shipped_texts("prompts", split="dev")[: given.prompts])
    for task in given.tasks:
        pairs = shipped(task, split="dev", read=given.read) if given.read else read_best(task, "dev")
        for name in given.methods:
            options = {"linearization": plant, "progress": False} if name == "lqr" else {}
            controller = getattr(sl, name)(model, pairs, **options)
            dial, values = DIALS[name]
            found = ((value, divergence(bench, controller.retuned(**{dial: value}))) for value in values)
            print(
                f"{task:11} {name:9} {dial}  " + "   ".join(f"{value:g}: {kl:.3f}" for value, kl in found), flush=True
            )
