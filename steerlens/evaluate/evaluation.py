"""What an evaluation found: every item's number, and views of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steerlens.core.types import Figure, Frame, Json
from steerlens.diagnose.result import frame
from steerlens.evaluate.bootstrap import interval, mean_interval
from steerlens.evaluate.card import evaluation_card, evaluation_html
from steerlens.evaluate.meter import Values, item_means, pooled
from steerlens.plots import load_plotly

#: The meter that every evaluation has.
DOSE = "dose"
UNSTEERED_NAME, RANDOM_NAME = "unsteered", "random"
#: Share of the items that counts as the worst.
WORST = 0.1


@dataclass(frozen=True)
class Measured:
    """Numbers of one arm on one meter, for each item.

    Attributes:
        layer: Where the arm acts, in a sweep over layers; else None.
        start, step: The numbers are those of items `start, start + step, ...`: arms that differ by their seed may share
            the items between them.
    """

    arm: str
    strength: float
    seed: int
    meter: str
    values: Values
    layer: int | None = None
    start: int = 0
    step: int = 1


@dataclass(frozen=True)
class Choice:
    """A row of an evaluation: its effect, with an interval, and its damage on items that it was not chosen on.

    Attributes:
        layer: Of a row of a sweep; else None.
    """

    arm: str
    strength: float
    effect: float
    interval: tuple[float, float]
    damage: float
    layer: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """Numbers of every arm, meter and item, and tables of them.

    Attributes:
        protocol: What the numbers depend on, as plain JSON.
        effect: Name of the meter that is the aim; the others are what it costs.
        meters: `{name: description}`, see `Meter.describe`.
        measured: All numbers.
        calibrations: `{arm: plain Calibration}` of arms whose strength was chosen by a budget.
        missing: What was not measured, in words.
    """

    protocol: Json
    effect: str
    meters: Mapping[str, Json]
    measured: tuple[Measured, ...]
    calibrations: Mapping[str, Json] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    @property
    def arms(self) -> list[tuple[str, float]]:
        """Name and strength of each row of the table, in the order of measurement."""
        return list(dict.fromkeys((own.arm, own.strength) for own in self.measured))

    def values(self, arm: str, strength: float, meter: str) -> Values:
        """The numbers of each item, those of several seeds one after the other; empty if it was not measured."""
        found: dict[int, list[float]] = {}
        for own in self._of(arm, strength, meter):
            for index, values in enumerate(own.values):
                found.setdefault(own.start + own.step * index, []).extend(values)
        return [found[index] for index in sorted(found)]

    def change(self, arm: str, strength: float, *, seed: int | None = None) -> Tensor:
        """Effect minus that of the unsteered model, of each item, `[item]`; of one seed, or the mean over seeds."""
        plain = item_means(self.values(UNSTEERED_NAME, 0.0, self.effect))
        if seed is None:
            return item_means(self.values(arm, strength, self.effect)) - plain
        own = next(own for own in self._of(arm, strength, self.effect) if own.seed == seed)
        return item_means(own.values) - plain

    def _of(self, arm: str, strength: float, meter: str) -> Iterator[Measured]:
        for own in self.measured:
            if (own.arm, own.strength, own.meter) == (arm, strength, meter):
                yield own

    def table(self, *, level: float = 0.95) -> Frame:
        """One row an arm and strength, a pandas DataFrame.

        Columns: `effect`, the mean change against the unsteered model, with its interval `low`, `high` (a bootstrap
        over items, paired); `worst`: the mean over the tenth of the items with the least change; `wrong way`: the share
        of items that moved against the aim; then each other meter at its poolings, relative ones as the unsteered
        model's value over this one, and one that is 0 without steering with its interval, `KL low` and `KL high` (a
        bootstrap over items); then the dose |u|/|x|.
        """
        rows: list[dict[str, Any]] = []
        for arm, strength in self.arms:
            row: dict[str, Any] = {"arm": arm, "strength": strength} | self._effect(arm, strength, level)
            for name, about in self.meters.items():
                if name != self.effect:
                    row |= self._cost(arm, strength, name, about, level)
            row[DOSE] = pooled(values, "mean") if (values := self.values(arm, strength, DOSE)) else float("nan")
            rows.append(row)
        return frame({name: [row[name] for row in rows] for name in rows[0]}, "arm")

    def _effect(self, arm: str, strength: float, level: float) -> dict[str, float]:
        change = self.change(arm, strength)
        low, high = mean_interval(change, level=level)
        signed = change * (self.meters[self.effect]["direction"] or 1)
        worst = signed.argsort()[: max(1, round(WORST * len(change)))]
        return {
            "effect": float(change.mean()),
            "low": low,
            "high": high,
            "worst": float(change[worst].mean()),
            "wrong way": float((signed < 0).double().mean()),
        }

    def _cost(self, arm: str, strength: float, name: str, about: Mapping[str, Any], level: float) -> dict[str, float]:
        values = self.values(arm, strength, name)
        plain = self.values(UNSTEERED_NAME, 0.0, name)
        found = {}
        for at in about["columns"]:
            title = name if at == "mean" and len(about["columns"]) == 1 else f"{name} {at}"
            value = pooled(values, at) if values else float("nan")
            found[title] = pooled(plain, at) / value if about["relative"] and value else value
            if at == "mean" and pooled(plain, at) == 0:
                # others are read against the row of the unsteered model
                ends = mean_interval(item_means(values), level=level) if values else (float("nan"),) * 2
                found |= zip((f"{name} low", f"{name} high"), ends, strict=True)
        return found

    @property
    def items(self) -> Frame:
        """One row an item of an arm, strength and seed, and one column a meter, a pandas DataFrame."""
        rows: dict[tuple[str, float, int, int], dict[str, Any]] = {}
        for own in self.measured:
            for index, value in enumerate(item_means(own.values).tolist()):
                item = own.start + own.step * index
                key = (own.arm, own.strength, own.seed, item)
                place = {"arm": own.arm, "strength": own.strength, "seed": own.seed, "item": item}
                rows.setdefault(key, place)[own.meter] = value
        names = ["arm", "strength", "seed", "item", *dict.fromkeys(own.meter for own in self.measured)]
        columns = {name: [row.get(name, float("nan")) for row in rows.values()] for name in names}
        return frame(columns, "arm")

    def interval(
        self, arm: str, strength: float, meter: str, at: str = "mean", *, level: float = 0.95
    ) -> tuple[float, float]:
        """An interval for a meter's pooled value, a bootstrap over items."""
        values = self.values(arm, strength, meter)

        def statistic(chosen: Tensor) -> float:
            return pooled([values[index] for index in chosen.tolist()], at)

        return interval(statistic, len(values), level=level)

    def difference(self, arm: str, other: str, *, level: float = 0.95) -> tuple[float, float, float]:
        """Effect of one arm minus that of another, paired over items: mean, low, high. Each has one strength.

        Raises:
            ValueError: an arm that is not there, or that has several strengths.
        """
        changes = []
        for name in (arm, other):
            strengths = [strength for known, strength in self.arms if known == name]
            if len(strengths) != 1:
                raise ValueError(f"{name!r} has strengths {strengths}; there are arms {self.arms}")
            changes.append(self.change(name, strengths[0]))
        gap = changes[0] - changes[1]
        return float(gap.mean()), *mean_interval(gap, level=level)

    def slopes(self, arm: str) -> Tensor:
        """Least-squares slope of each item's effect against the strength, strength 0 included, `[item]`.

        Raises:
            ValueError: the arm has one strength only.
        """
        strengths = sorted({strength for name, strength in self.arms if name == arm} | {0.0})
        if len(strengths) < 2:
            raise ValueError(f"{arm!r} has no strengths to take a slope over; there are {self.arms}")
        changes = [
            self.change(arm, s) if (arm, s) in self.arms else torch.zeros_like(self.change(*self.arms[0]))
            for s in strengths
        ]
        x = torch.tensor(strengths, dtype=torch.float64)
        x = x - x.mean()
        return (x[:, None] * torch.stack(changes)).sum(0) / x.square().sum()

    def choose(self, meter: str, limit: float, *, level: float = 0.95) -> Choice:
        """The row with the most effect within a budget, chosen on every second item and reported on the others.

        Args:
            meter: Name of a meter of damage, pooled by its own `at`.
            limit: Its largest value, on the items of the choice.
            level: Of the interval.

        Raises:
            ValueError: no such meter, or no row within the budget.
        """
        if meter not in self.meters:
            raise ValueError(f"no meter {meter!r}; there are {', '.join(self.meters)}")
        sign, at = self.meters[self.effect]["direction"] or 1, self.meters[meter]["at"]
        steered = [arm for arm in self.arms if arm[0] not in (UNSTEERED_NAME, RANDOM_NAME)]
        costs = {arm: pooled(values[::2], at) for arm in steered if (values := self.values(*arm, meter))}
        inside = {arm: sign * float(self.change(*arm)[::2].mean()) for arm in costs if costs[arm] <= limit}
        if not inside:
            least = [
                f"{costs[arm]:.3g} of {arm[0]} at strength {arm[1]:g}" for arm in sorted(costs, key=costs.__getitem__)
            ]
            raise ValueError(
                f"no row has a {meter} of at most {limit:g} on the items of the choice; the least is "
                f"{', '.join(least[:1]) or 'unknown: it was not measured'}. Give smaller strengths, or a larger limit"
            )
        name, strength = max(inside, key=lambda arm: inside[arm])
        held = self.change(name, strength)[1::2]
        damage = pooled(self.values(name, strength, meter)[1::2], at)
        own = next(self._of(name, strength, self.effect))
        return Choice(name, strength, float(held.mean()), mean_interval(held, level=level), damage, own.layer)

    def plot(self, against: str | None = None) -> Figure:
        """Effect against a meter of damage, one curve a method with intervals of the effect; the random band is grey.

        Args:
            against: Name of the meter; default the first one that is not the effect.
        """
        objects, _ = load_plotly()
        against = against or next(name for name in self.meters if name != self.effect)
        figure = objects.Figure()
        for name in dict.fromkeys(name for name, _ in self.arms):
            strengths = [strength for known, strength in self.arms if known == name]
            if name == RANDOM_NAME:
                _band(objects, figure, self, strengths, against)
            else:
                _curve(objects, figure, self, name, strengths, against)
        about = self.meters
        figure.update_xaxes(title_text=f"{against} ({about[against]['unit']})")
        figure.update_yaxes(title_text=f"change of {self.effect} ({about[self.effect]['unit']})")
        return figure.update_layout(title="Effect against damage", width=900, height=480, template="simple_white")

    def card(self) -> str:
        """The tables and the protocol as Markdown, for an appendix."""
        return evaluation_card(self)

    def _repr_html_(self) -> str:
        return evaluation_html(self)

    def __repr__(self) -> str:
        return f"Evaluation({self.effect}: {len(self.arms)} rows, {len(self.change(*self.arms[0]))} items)"


def _curve(objects: Any, figure: Any, found: Evaluation, name: str, strengths: list[float], against: str) -> None:
    known = [s for s in sorted(strengths) if found.values(name, s, against)]
    changes = [found.change(name, s) for s in known]
    middle = [float(change.mean()) for change in changes]
    ends = [mean_interval(change) for change in changes]
    error = {
        "type": "data",
        "array": [high - value for (_, high), value in zip(ends, middle, strict=True)],
        "arrayminus": [value - low for (low, _), value in zip(ends, middle, strict=True)],
    }
    damage = [pooled(found.values(name, s, against), "mean") for s in known]
    text = [f"strength {s:.3g}" for s in known]
    figure.add_trace(objects.Scatter(x=damage, y=middle, error_y=error, text=text, name=name, mode="lines+markers"))


def _band(objects: Any, figure: Any, found: Evaluation, strengths: list[float], against: str) -> None:
    """Mean effects of all random directions as points, and the range that they span."""
    for strength in strengths:
        own = {one.seed: item_means(one.values).mean() for one in found._of(RANDOM_NAME, strength, against)}
        effects = [float(found.change(RANDOM_NAME, strength, seed=seed).mean()) for seed in own]
        damage = [float(value) for value in own.values()]
        grey = {"color": "grey", "symbol": "x"}
        label = f"{RANDOM_NAME} x{len(own)}"
        figure.add_trace(objects.Scatter(x=damage, y=effects, mode="markers", name=label, marker=grey))
        if effects:
            figure.add_hrect(y0=min(effects), y1=max(effects), fillcolor="grey", opacity=0.15, line_width=0)
