"""When does feedback pay? Open loops against closed ones at one KL, undisturbed and disturbed.

python benchmarks/feedback.py                              # sentiment; resumable: what is measured is kept in a folder
python benchmarks/feedback.py --task ocean --parts texts   # one part: effects, texts or undoing

Every controller is fitted on the dev half of a set, and its strength (of fixed vectors) or level (of loops) is chosen
on dev prompts so that the KL is 0.3 nats per token. Then, on the held-out half:

effects: how much likelier the wanted completion has become than the unwanted one, in nats per token: as it is; while a
    second controller pushes the other way after block 12; and after a text of the unwanted side. Paired 95 % intervals
    against the fixed push at every layer.
texts: what each controller writes, sampled after held-out prompts: the shift along the feature that is left in the
    steered state at five sixths of the depth, in the first and the last quarter of the text, its spread over the
    tokens, and how far the text itself has moved, as the unsteered model reads it; in units of the class difference.
undoing: what the blocks do to a shift along the feature, by their Jacobians: the share of it that the next block keeps,
    and what arrives before the last block.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import common  # noqa: F401 (first, as it sets the environment)

import torch  # isort: skip
from budget import LIMIT, MODELS, at_limit, jacobians
from equal import read_best
from torch import Tensor

import steerlens as sl
from steerlens.core import Controller
from steerlens.evaluate import Arm, Bench, generate_texts, propensity
from steerlens.evaluate.bootstrap import mean_interval
from steerlens.evaluate.log import Log
from steerlens.fit.contrast import Text
from steerlens.fit.shipped import shipped, shipped_texts

PARTS = ("effects", "texts", "undoing")
#: What the others are compared with.
OPEN = "every layer"
FREE, PUSHED, ADVERSE = "undisturbed", "pushed back", "after unwanted text"


class Study:
    """A model, a set of texts, and the controllers at one KL.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model.
        task: A shipped set.
        folder: Keeps the Jacobians and what has been measured; a run goes on where another with equal numbers ended.
        prompts: How many prompts a level is chosen on.
        numbers: Of items, texts and tokens, on which what is kept depends.
    """

    def __init__(self, model: Any, task: str, folder: Path, *, prompts: int, numbers: Mapping[str, Any] | None = None):
        self.model, self.task = model, task
        self.depth = sl.hosts.host_of(model).n_layers
        self.dev = read_best(task, "dev")
        self.bench = Bench(model, shipped_texts("prompts", split="dev")[:prompts])
        self.plant = jacobians(model, folder)
        self.vectors = sl.caa(model, self.dev, layers="all")
        file = None if numbers is None else folder / f"{task}.jsonl"
        self.log = Log(file, {"task": task, "prompts": prompts, **(numbers or {})})

    def vector(self, layer: int) -> Tensor:
        """The class difference after a block, `[d]`."""
        return self.vectors.loops[layer].law.vector

    def controllers(self) -> dict[str, Controller]:
        """Open loops and closed ones, each with its KL printed; `hold` is closed, at the middle layer."""
        loop = {"linearization": self.plant, "progress": False}
        firm = {"q": 0.1, "r": 1.0, "qf": 0.1, "solver": "dense"}
        makers: dict[str, tuple[float, Callable[[float], Controller]]] = {
            "one layer": (1.5, lambda s: self.vectors.only([self.depth // 2]) * s),
            "hold": (2.5, lambda s: sl.hold(self.model, self.dev, level=s)),
            OPEN: (0.1, lambda s: self.vectors * s),
            "relative loop": (3.0, lambda s: sl.lqr(self.model, self.dev, level=s, **loop)),
            "relative loop, firm": (1.5, lambda s: sl.lqr(self.model, self.dev, level=s, **loop, **firm)),
            "loop from zero": (1.0, lambda s: sl.lqr(self.model, self.dev, level=s, paper=True, **loop)),
        }
        with sl.readings(self.model):
            return {name: self.met(name, dial, make) for name, (dial, make) in makers.items()}

    def met(self, name: str, dial: float, make: Callable[[float], Controller]) -> Controller:
        """What a function makes of a strength or level, at that at which the KL is the limit."""
        key = ["level", name]
        if key in self.log:
            dial, value = self.log[key]
            controller = make(dial)
        else:
            controller, dial, value = at_limit(self.bench, make, dial, rounds=5)
            self.log.put(key, [dial, value])
        print(f"  {name:20} strength or level {dial:.3g}, KL {value:.2f}", flush=True)
        return controller


def effects(study: Study, controllers: dict[str, Controller], items: int) -> None:
    """Prints the change of the propensity of held-out items under three conditions."""
    held = shipped(study.task, split="held_out")[:items]
    away = study.vectors.only([round(0.4 * study.depth)]) * -2
    meters = {FREE: propensity(held), PUSHED: propensity(held), ADVERSE: propensity(after_the_unwanted(held))}
    plain = {case: measured(study, "unsteered", case, meter, None) for case, meter in meters.items()}
    alone = measured(study, "the push", PUSHED, meters[PUSHED], away) - plain[PUSHED]
    print(f"\nchange of wanted over unwanted, nats per token, {len(held.positive)} held-out items")
    print(f"  the push alone {interval(alone)}")
    found: dict[str, dict[str, Tensor]] = {}
    for name, controller in controllers.items():
        found[name] = {
            case: measured(study, name, case, meter, controller + away if case == PUSHED else controller) - plain[case]
            for case, meter in meters.items()
        }
        line = "   ".join(f"{case} {interval(value)}" for case, value in found[name].items())
        print(f"  {name:20} {line}", flush=True)
    print("minus the fixed push at every layer; and what the push takes away")
    for name, changes in found.items():
        gaps = "   ".join(f"{case} {interval(value - found[OPEN][case])}" for case, value in changes.items())
        print(f"  {name:20} {gaps}   lost {interval(changes[FREE] - changes[PUSHED])}")


def after_the_unwanted(held: sl.Pairs) -> sl.Pairs:
    """Both texts of each pair after the unwanted text of the next one."""
    others = held.negative[1:] + held.negative[:1]

    def joined(text: Text, other: Text) -> tuple[str, str]:
        before = " ".join(other) if isinstance(other, tuple) else str(other)
        prompt, completion = text if isinstance(text, tuple) else ("", text)
        return f"{before} {prompt}", str(completion)

    return sl.Pairs(
        *([joined(*both) for both in zip(side, others, strict=True)] for side in (held.positive, held.negative))
    )


def measured(study: Study, name: str, case: str, meter: sl.evaluate.Meter, controller: Controller | None) -> Tensor:
    """One number an item."""
    key = ["effect", name, case]
    if key not in study.log:
        study.log.put(key, [sum(item) / len(item) for item in meter(study.bench, Arm("measured", controller))])
    return torch.tensor(study.log[key])


def interval(values: Tensor) -> str:
    """A mean with its interval over items."""
    low, high = mean_interval(values)
    return f"{float(values.mean()):+.2f} ({low:+.2f} to {high:+.2f})"


def texts(study: Study, controllers: dict[str, Controller], prompts: int, tokens: int) -> None:
    """Prints what is left of the shift along sampled texts, and how far the texts themselves have moved."""
    asked = of_one_length(study, shipped_texts("prompts", split="held_out"))[:prompts]
    print(f"\n{tokens} tokens after {len(asked)} prompts, along v at five sixths of the depth, in class differences")
    found: dict[str, Tensor] = {}
    for name, controller in {"unsteered": None, **controllers}.items():
        key = ["text", name]
        if key not in study.log:
            study.log.put(key, written(study, controller, asked, tokens))
        found[name] = torch.tensor(study.log[key])
        if controller is None:
            continue
        early, late, spread, *_ = found[name].unbind(1)
        moved = (found[name] - found["unsteered"])[:, 3:].unbind(1)
        print(f"  {name}")
        print(f"    shift: first quarter {interval(early)}, last {interval(late)}, change {interval(late - early)}")
        print(f"    spread over the tokens of a text {interval(spread)}")
        print(f"    text: first quarter {interval(moved[0])}, last {interval(moved[1])}", flush=True)
    print("minus the fixed push at every layer: shift in the last quarter, spread, text in the last quarter")
    for name in controllers:
        gaps = (found[name] - found[OPEN]).unbind(1)
        print(f"  {name:20} " + "   ".join(interval(gaps[column]) for column in (1, 2, 4)))


def of_one_length(study: Study, prompts: Sequence[str]) -> list[str]:
    """The prompts of the commonest length in tokens: they are continued together."""
    groups: dict[int, list[str]] = {}
    for prompt in prompts:
        groups.setdefault(len(study.bench.prompt(prompt)), []).append(prompt)
    return max(groups.values(), key=len)


def written(study: Study, controller: Controller | None, asked: Sequence[Text], tokens: int) -> list[list[float]]:
    """A row a text: the shift in its first and last quarter, its spread over all tokens, the text in both quarters."""
    layer = round(5 / 6 * study.depth)
    v = study.vector(layer)
    rows = []
    options = {"max_new_tokens": tokens, "temperature": 0.8, "batch": len(asked)}
    for text in generate_texts(study.model, controller, asked, **options):
        ids, start = [*text.prompt, *text.completion], len(text.prompt)
        own = features(study, None, ids, start, layer, v)
        shift = torch.zeros_like(own) if controller is None else features(study, controller, ids, start, layer, v) - own
        # of what was written: a text may end before its tokens are used up
        quarter = max(len(own) // 4, 1)
        values = (
            shift[:quarter].mean(),
            shift[-quarter:].mean(),
            shift.std(),
            own[:quarter].mean(),
            own[-quarter:].mean(),
        )
        rows.append([float(value) for value in values])
    return rows


def features(
    study: Study, controller: Controller | None, ids: Sequence[int], start: int, layer: int, v: Tensor
) -> Tensor:
    """<v, x> over |v|^2 at each token after the prompt, `[token]`, steered or not."""
    hook = f"blocks.{layer}.hook_resid_post"
    tokens = torch.tensor([list(ids)])
    with torch.no_grad():
        if controller is None:
            _, cache = study.model.run_with_cache(tokens, names_filter=hook)
        else:
            with sl.steer(study.model, controller, record=None) as run, run.scoring(start):
                _, cache = study.model.run_with_cache(tokens, names_filter=hook)
    return (cache[hook][0, start:] @ v / v.square().sum()).cpu()


def undoing(study: Study) -> None:
    """Prints what the blocks do to a shift along the feature, by their Jacobians at ordinary text."""
    last = study.depth - 1
    vectors = [study.vector(t) for t in range(study.depth)]
    # the direction after the last block, pulled back through the blocks
    reads = {last: vectors[last] / vectors[last].square().sum()}
    for t in range(last - 1, -1, -1):
        reads[t] = reads[t + 1] @ study.plant.jacobian(t + 1)
    print("\nof a shift by one class difference after block t, what is left: after block t+1, along itself and along")
    print("the class difference there, and after the last block, along the one there")
    for t in range(0, last, max(1, study.depth // 10)):
        v, then = vectors[t], vectors[t + 1]
        moved = study.plant.jacobian(t + 1) @ v
        along, onwards = float(moved @ v / v.square().sum()), float(moved @ then / then.square().sum())
        print(f"  t = {t:2}: {along:+.2f}, {onwards:+.2f}, {float(reads[t] @ v):+.2f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--task", default="sentiment")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--folder", type=Path, default=Path("feedback"))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--items", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--texts", type=int, default=12)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    given.folder.mkdir(parents=True, exist_ok=True)
    numbers = {"model": given.model, "items": given.items, "texts": given.texts, "tokens": given.tokens}
    study = Study(MODELS[given.model](), given.task, given.folder, prompts=given.prompts, numbers=numbers)
    if "undoing" in given.parts:
        undoing(study)
    if set(given.parts) != {"undoing"}:
        print(f"\n{given.task}: at a KL of {LIMIT} on {given.prompts} dev prompts")
        found = study.controllers()
        if "effects" in given.parts:
            effects(study, found, given.items)
        if "texts" in given.parts:
            texts(study, found, given.texts, given.tokens)
