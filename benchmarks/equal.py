"""Controllers at one KL on dev prompts, scored on held-out pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from budget import at_limit
from torch import Tensor

import steerlens as sl
from steerlens.core import Controller, Site
from steerlens.evaluate import Arm, Bench, propensity
from steerlens.evaluate.bench import UNSTEERED
from steerlens.evaluate.bootstrap import mean_interval
from steerlens.evaluate.log import Log
from steerlens.evaluate.meter import item_means
from steerlens.fit.contrast import tokenize
from steerlens.fit.shipped import shipped, shipped_texts
from steerlens.hosts import host_of


def read_best(task: str, split: str) -> sl.Pairs:
    """Half of a shipped set, read over its completions, or as a mean over its sentences."""
    completed = isinstance(shipped(task, split=split).positive[0], tuple)
    return shipped(task, split=split, read="completion" if completed else "mean")


def ordinary(model: Any, texts: list[str], sites: Sequence[Site]) -> dict[Site, Tensor]:
    """States of all tokens of some texts, `[token d]`, but of position 0, which is an attention sink."""
    host = host_of(model)
    states = host.states([tokenize(text, host)[0] for text in texts], sites)
    return {site: torch.cat([x[1:] for x in states[site]]) for site in sites}


class Field:
    """Held-out pairs of a task, and what each controller at one KL does to them.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model.
        task: A shipped set.
        folder: Keeps the continuations on which the KL is measured.
        prompts: How many dev prompts are continued.
        items: How many pairs are scored.
        split: The half that is scored.
    """

    def __init__(
        self, model: Any, task: str, folder: Path, *, prompts: int = 8, items: int = 16, split: str = "held_out"
    ):
        self.bench = Bench(model, shipped_texts("prompts", split="dev")[:prompts])
        # sampled once for all tasks and runs
        self.bench.log = Log(folder / f"continuations{prompts}.jsonl", {"prompts": prompts})
        self.meter = propensity(shipped(task, split=split)[:items])
        self.found: dict[str, Tensor] = {}
        # a row is measured once, so that a run that was cut off goes on
        self.log = Log(folder / f"{task}-{split}.jsonl", {"prompts": prompts, "items": items})
        self._plain: Tensor | None = None

    @property
    def plain(self) -> Tensor:
        """The preference of the unsteered model, `[item]`."""
        if self._plain is None:
            self._plain = item_means(self.meter(self.bench, UNSTEERED))
        return self._plain

    def score(self, name: str, controller: Controller, start: float = 1.5, dial: str = "level") -> None:
        """Turn a controller to the KL, and print its row: the mean effect, and intervals of the gap to earlier rows."""
        if name not in self.log:
            turned, value, kl = at_limit(
                self.bench, lambda value: controller.retuned(**{dial: value}), start, rounds=6, tolerance=0.05
            )
            effect = item_means(self.meter(self.bench, Arm(name, turned))) - self.plain
            self.log.put(name, [value, kl, effect.tolist()])
        value, kl, kept = self.log[name]
        effect, gaps = torch.tensor(kept, dtype=torch.float64), ""
        for other, held in list(self.found.items())[:2]:
            low, high = mean_interval(effect - held)
            gaps += f"   against {other} {float((effect - held).mean()):+.2f} ({low:+.2f} to {high:+.2f})"
        self.found[name] = effect
        print(f"  {name:34} {float(effect.mean()):+.3f}   {dial} {value:.3g}, KL {kl:.2f}{gaps}", flush=True)
