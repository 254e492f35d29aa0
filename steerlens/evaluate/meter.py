"""A meter: a frozen object around a function that gives numbers for each item."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from steerlens.core.types import Json
from steerlens.evaluate.bench import Arm, Bench
from steerlens.evaluate.log import digest
from steerlens.fit.contrast import Text

#: For each item the numbers that it gave: one, or one a token.
Values: TypeAlias = list[list[float]]
#: What a meter is measured on: texts, pairs of texts, sets of choices; its function knows.
Items: TypeAlias = Sequence[Any]


@dataclass(frozen=True)
class Meter:
    """What is measured on a steered model, one or more numbers for each item.

    `meter <= limit` is a budget, for `calibrate` and `compare`.

    Args:
        name: Of its column.
        function: `(bench, arm, items) -> [[number, ...] for each item]`. `bench.logits` and `bench.texts` run the model
            as the arm steers it.
        unit: Of the numbers.
        direction: 1 if more is wanted, -1 if less is, 0 if neither.
        needs: `"logits"`, of given texts: cheap and exact; or `"text"` that the model writes.
        at: How items are pooled: `"mean"` over items, or `"p95"`: that percentile of all numbers of all items.
        items: What it is measured on; None: the prompts of the evaluation.
        columns: Poolings that a table shows.
        relative: A table shows the ratio of the unsteered model's value to this one.
        proxy: The numbers stand for something that they do not measure; a table's header names it.
        options: What else determines the numbers, as plain JSON, for the protocol.
        prompts: Of the items, in their order: what other meters use, unless the evaluation names prompts.
        instruction: What a prompt baseline asks of the model, if the evaluation names none.
    """

    name: str
    function: Callable[[Bench, Arm, Items], Values]
    unit: str = ""
    direction: int = 1
    needs: str = "logits"
    at: str = "mean"
    items: Items | None = None
    columns: tuple[str, ...] = ("mean",)
    relative: bool = False
    proxy: bool = False
    options: Json = field(default_factory=dict)
    prompts: tuple[Text, ...] | None = None
    instruction: str = ""

    def __post_init__(self) -> None:
        if self.needs not in ("logits", "text"):
            raise ValueError(f"needs={self.needs!r}; it is 'logits' or 'text'")
        if self.direction not in (-1, 0, 1):
            raise ValueError(f"direction={self.direction}; it is 1, -1 or 0")
        for at in (self.at, *self.columns):
            _quantile(at)
        if self.items is not None and not self.items:
            raise ValueError(f"the meter {self.name!r} has no items; give at least one")

    def __call__(self, bench: Bench, arm: Arm) -> Values:
        """Its numbers for each item, as an arm steers the model.

        Raises:
            ValueError: the function gave another number of items, or none for an item.
        """
        items = self.over(bench)
        values = [
            [float(value) for value in item] if isinstance(item, (list, tuple)) else [float(item)]
            for item in self.function(bench, arm, items)
        ]
        if len(values) != len(items) or not all(values):
            raise ValueError(f"the meter {self.name!r} gave numbers for {len(values)} of {len(items)} items")
        return values

    def over(self, bench: Bench) -> Items:
        """The items: its own, or the bench's prompts."""
        return bench.prompts if self.items is None else self.items

    def half(self, held_out: bool) -> Meter:
        """On every second item of its own, from the first one on, or held out: from the second on."""
        if self.items is None:
            return self
        part = slice(int(held_out), None, 2)
        prompts = None if self.prompts is None else self.prompts[part]
        return replace(self, items=self.items[part], prompts=prompts)

    def pool(self, values: Values, at: str | None = None) -> float:
        """One number of all items."""
        return pooled(values, at or self.at)

    def __le__(self, limit: float) -> Budget:
        return Budget(self, float(limit))

    def describe(self) -> Json:
        """What determines its numbers, as plain JSON."""
        known = {
            name: getattr(self, name) for name in ("name", "unit", "direction", "needs", "at", "relative", "proxy")
        }
        items = None if self.items is None else digest(self.items)
        return {**known, "columns": list(self.columns), "items": items, "options": dict(self.options)}


@dataclass(frozen=True)
class Budget:
    """The largest value of a meter that is allowed."""

    meter: Meter
    limit: float

    def __str__(self) -> str:
        return f"{self.meter.name} {self.meter.at} <= {self.limit:g}"


def pooled(values: Values, at: str) -> float:
    """The mean over items of each one's mean, or a percentile of all their numbers."""
    quantile = _quantile(at)
    if quantile is None:
        return float(item_means(values).mean())
    return float(torch.tensor([value for item in values for value in item], dtype=torch.float64).quantile(quantile))


def item_means(values: Values) -> Tensor:
    """One number for each item, `[item]`, float64."""
    return torch.tensor([sum(item) / len(item) for item in values], dtype=torch.float64)


def _quantile(at: str) -> float | None:
    """None for the mean.

    Raises:
        ValueError: neither "mean" nor "p" and a percentile.
    """
    if at == "mean":
        return None
    if at.startswith("p") and at[1:].replace(".", "", 1).isdigit() and float(at[1:]) <= 100:
        return float(at[1:]) / 100
    raise ValueError(f"at={at!r}; it is 'mean', or a percentile such as 'p95'")


def fixed(items: Sequence[Any] | None) -> tuple[Any, ...] | None:
    """Items as a meter holds them; None stays None."""
    return None if items is None else tuple(items)
