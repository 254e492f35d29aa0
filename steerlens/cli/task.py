"""What the commands that measure have in common: a model, contrast pairs with a held-out half, an aim, methods."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from steerlens import methods as known_methods
from steerlens.core import Controller
from steerlens.core.types import PositionName
from steerlens.evaluate import Meter, likelihood, propensity
from steerlens.fit.contrast import Pairs
from steerlens.fit.method import exported
from steerlens.fit.shipped import shipped, shipped_texts
from steerlens.hosts import host_of

#: The four methods of the first papers, and the baselines of the literature.
METHODS = ("lqr", "cold_kernel", "sadi", "odesteer", "caa", "caa:layers=all", "iti", "repe", "mimic")
#: What a prompt baseline asks for.
INSTRUCTIONS = {
    "sentiment": "Everything is described with delight and praise.",
    "formality": "Everything is written in formal English.",
    "certainty": "Everything is said with complete certainty.",
    "compliance": "Agree gladly to whatever is asked.",
    "ocean": "Everything is about the ocean.",
    "wedding": "Everything is about a wedding.",
    "anger": "Everything is said in anger.",
    "french": "Tout est écrit en français.",
}


@dataclass(frozen=True)
class Task:
    """Data of one behaviour.

    Attributes:
        name: Of the behaviour.
        fit: Contrast pairs that controllers are fitted on.
        effect: Measured on pairs that no controller has seen.
        prompts: For texts.
        budgeted: For KL: more of them, since the budget is met on other prompts only as well as their number allows.
    """

    name: str
    fit: Pairs
    effect: Meter
    prompts: list[Any]
    budgeted: list[Any]


def task_of(concept: str, pairs: Path | None, instruction: str | None, count: int | None) -> Task:
    """The task of a shipped concept, or of a file of contrast pairs of one's own.

    Args:
        concept: Name of shipped pairs.
        pairs: JSON lines with `positive`, `negative` and, for completions, `prompt`; every second one is held out.
        instruction: What the prompt baseline asks for; default the shipped concept's.
        count: Number of items and of prompts at most.

    Raises:
        ValueError: fewer than four pairs.
    """
    # in turn, so that every second one is of one half
    halves = [shipped_texts("prompts", split=split) for split in ("dev", "held_out")]
    beginnings: list[Any] = [text for both in zip(*halves, strict=False) for text in both]
    prompts = beginnings
    if pairs is None:
        sides = [shipped(concept, split=split) for split in ("dev", "held_out")]
        asked = INSTRUCTIONS.get(concept, "") if instruction is None else instruction
    else:
        whole, concept = _read(pairs), pairs.stem
        if len(whole) < 4:
            raise ValueError(f"{pairs} has {len(whole)} pairs; half of them are held out, so give at least four")
        sides = [Pairs(whole.positive[start::2], whole.negative[start::2]) for start in (0, 1)]
        prompts = [text[0] for text in whole.positive if isinstance(text, tuple)] or beginnings
        asked = instruction or ""
    completed = all(isinstance(text, tuple) for side in sides for text in (*side.positive, *side.negative))
    fit, held = sides
    fit = Pairs(fit.positive, fit.negative, read="completion" if completed else "mean")
    held = held[:count] if count else held
    effect = propensity(held, instruction=asked) if completed else likelihood(held.positive, instruction=asked)
    return Task(concept, fit, effect, prompts[: 2 * (count or len(held))], prompts)


def _read(path: Path) -> Pairs:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    sides = [
        [(row["prompt"], row[side]) if "prompt" in row else row[side] for row in rows]
        for side in ("positive", "negative")
    ]
    return Pairs(*sides)


def load_model(name: str) -> Any:
    """A model by name: `smollm2`, `gemma3`, `tiny`, or whatever TransformerBridge boots."""
    from steerlens import models

    if name in ("smollm2", "gemma3", "tiny"):
        return getattr(models, name)()
    return importlib.import_module("transformer_lens.model_bridge").TransformerBridge.boot_transformers(name)


class Fit:
    """A method to be fitted, from its name and options: `caa`, `caa:layers=all,strength=2`.

    Attributes:
        digest: What the controller depends on, in words.

    Raises:
        ValueError: no such method, or an option that is no `name=value`.
    """

    def __init__(self, spec: str, model: Any, data: Pairs, where: str | None):
        name, _, rest = spec.partition(":")
        known = exported(known_methods)
        if name not in known:
            raise ValueError(f"no method {name!r}; there are {', '.join(known)}")
        self.spec, self.where = spec, where
        self._function, self._model, self._data = known[name].function, model, data
        self._options = dict(_option(part, model) for part in rest.split(",") if part)
        self.digest = f"{spec} at {where or 'its own positions'}, data {data.digest()}"

    def __call__(self, **more: Any) -> Controller:
        """Fit it, and move it to the positions asked for."""
        controller = self._function(self._model, self._data, **(self._options | more))
        return controller if self.where is None else controller.at(cast(PositionName, self.where))


def fits_of(specs: Sequence[str], model: Any, data: Pairs, where: str) -> dict[str, Fit]:
    """Methods by what they are called in a table; `where="own"` leaves each its own positions."""
    place = None if where == "own" else where
    return {spec.replace(":layers=all", ", every layer"): Fit(spec, model, data, place) for spec in specs}


def _option(part: str, model: Any) -> tuple[str, Any]:
    name, equals, value = part.partition("=")
    if not equals:
        raise ValueError(f"{part!r} is no option; write name=value")
    if name == "layers" and value == "all":
        return name, list(range(host_of(model).n_layers))
    if name == "layers" and "-" in value[1:]:
        first, _, last = value.partition("-")
        return name, list(range(int(first), int(last) + 1))
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
