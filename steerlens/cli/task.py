"""What the commands that measure have in common: a model, contrast pairs with a held-out half, an aim, methods."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from steerlens.cli.options import known_method, on_model, read_options, split_options
from steerlens.core import Controller
from steerlens.core.positions import check_where
from steerlens.core.types import PositionName
from steerlens.evaluate import Meter, likelihood, propensity
from steerlens.fit.contrast import Pairs
from steerlens.fit.method import Method
from steerlens.fit.shipped import shipped, shipped_texts

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
        pairs: A csv or JSON lines, see `Pairs.from_file`; every second pair is held out.
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
        whole, concept = Pairs.from_file(pairs), pairs.stem
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
    return Task(concept, fit, effect, _alike(prompts)[: 2 * (count or len(held))], prompts)


def _alike(prompts: list[Any]) -> list[Any]:
    """Prompts with the most common number of words first: texts after prompts of one length are written together."""
    sizes = Counter(len(str(prompt).split()) for prompt in prompts)
    return sorted(prompts, key=lambda prompt: -sizes[len(str(prompt).split())])


def read_fit(spec: str) -> tuple[Method, dict[str, Any]]:
    """The method and the options of a text such as `caa:layers=all`; raises ValueError as `Fit` does."""
    name, _, rest = spec.partition(":")
    method = known_method(name)
    return method, read_options(method, split_options(rest))


class Fit:
    """A method to be fitted, from its name and options: `caa`, `caa:layers=all,strength=2`.

    Attributes:
        digest: What the controller depends on, in words.

    Raises:
        ValueError: no such method, an option that is no `name=value`, or no such positions.
    """

    def __init__(self, spec: str, model: Any, data: Pairs, where: str | None):
        method, options = read_fit(spec)
        if where is not None:
            check_where(where)
        self.spec, self.where = spec, where
        self._function, self._model, self._data = method.function, model, data
        self._options = on_model(options, model)
        self.digest = f"{spec} at {where or 'its own positions'}, data {data.digest()}"

    def __call__(self, **more: Any) -> Controller:
        """Fit it, and move it to the positions asked for."""
        controller = self._function(self._model, self._data, **(self._options | more))
        return controller if self.where is None else controller.at(cast(PositionName, self.where))


def fits_of(specs: Sequence[str], model: Any, data: Pairs, where: str) -> dict[str, Fit]:
    """Methods by what they are called in a table; `where="own"` leaves each its own positions."""
    place = None if where == "own" else where
    return {spec.replace(":layers=all", ", every layer"): Fit(spec, model, data, place) for spec in specs}
