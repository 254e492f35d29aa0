"""The strength, level or angle at which a controller spends a budget, in few evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from steerlens.core import Controller
from steerlens.core.progress import counting
from steerlens.core.types import Figure, Frame, Json
from steerlens.diagnose.result import curves, frame
from steerlens.evaluate.bench import UNSTEERED, Arm, Bench
from steerlens.evaluate.bootstrap import draws, ends
from steerlens.evaluate.meter import Budget, Meter, Values, pooled
from steerlens.fit.contrast import Text
from steerlens.hosts.types import Model
from steerlens.pages.reprs import calibration_html

MET, NEVER, NOTHING = "met", "never", "by doing nothing"
#: What is searched by default: a factor on every control.
STRENGTH = "strength"
#: A value below this share of the budget is nothing.
NEGLIGIBLE = 0.02
#: With twice as many items the search begins on about so many of them.
COARSE = 24
#: How far from the limit the value on those may be, relative.
COARSELY = 0.15


@dataclass(frozen=True)
class Calibration:
    """A strength that meets a budget.

    Attributes:
        controller: The controller at this strength.
        strength: Factor on every control; if another argument was searched, the value of that.
        interval: Of the strength at which the budget would be met on other prompts of the same kind; NaN if there is
            none.
        curve: `(strength, value)` of every evaluation, by strength.
        met: `"met"`; `"never"`: the unsteered model is over the budget; `"by doing nothing"`: within the budget are
            only strengths at which the controller does next to nothing.
        value: The meter's value at this strength.
        budget: In words.
        note: What else there is to know, such as that the value stays below the budget; empty if nothing.
        argument: What was searched: `"strength"`, or an argument such as `"level"`.
    """

    controller: Controller
    strength: float
    interval: tuple[float, float]
    curve: tuple[tuple[float, float], ...]
    met: str
    value: float
    budget: str
    note: str = ""
    argument: str = STRENGTH

    def table(self) -> Frame:
        """The curve as a pandas DataFrame."""
        strengths, values = zip(*self.curve, strict=True)
        return frame({self.argument: strengths, "value": values}, self.argument)

    def plot(self) -> Figure:
        """The meter's value against the strength."""
        strengths, values = zip(*self.curve, strict=True)
        title = f"{self.budget}: {self.met} at {self.argument} {self.strength:.3g}"
        return curves({"value": (strengths, torch.tensor(values))}, title=title, x=self.argument, y=self.budget)

    def _repr_html_(self) -> str:
        return calibration_html(self)

    def plain(self) -> Json:
        """All but the controller, as plain JSON."""
        names = ("strength", "interval", "curve", "met", "value", "budget", "note", "argument")
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        low, high = self.interval
        return (
            f"Calibration({self.argument} {self.strength:.3g}, {low:.3g} to {high:.3g}; {self.budget}: {self.met} "
            f"with {self.value:.3g} in {len(self.curve)} evaluations{'; ' + self.note if self.note else ''})"
        )


def calibrate(
    model: Model,
    controller: Controller,
    prompts: Sequence[Text],
    *,
    budget: Budget,
    argument: str = STRENGTH,
    tolerance: float = 0.04,
    largest: float = 64.0,
    evaluations: int = 12,
    level: float = 0.95,
    batch: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    """The largest strength within a budget: `calibrate(model, c, prompts, budget=evaluate.kl() <= 0.3).controller`.

    A search in log strength and log value, which are a line for a KL at small strengths: KL grows as s^2. Secants while
    they stay inside what is known, else halves. With many prompts it begins on some of them, so that only the last few
    evaluations need all. The interval is that of the crossing under a bootstrap over prompts.

    How well the budget is met on other prompts is a matter of their number: the relative error is about
    `cv sqrt(2 / n)`, with cv the spread of the prompts' values over their mean, .3 to .7 for a KL.

    With `argument="level"` the level of `lqr`, `pid` or `hold` is searched instead of a factor on the control, which
    would make a loop softer: any positive number that `controller.retuned` takes. Nothing is fitted again, and no text
    of the fit is read.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model.
        controller: What is scaled, or its argument changed.
        prompts: Where the meter is measured, if it has no items of its own. Report effects on others.
        budget: `meter <= limit`, of a meter that grows with the strength.
        argument: What is searched: `"strength"`, a factor on what the controller has, or an argument of its method.
        tolerance: How far from the limit the value may be, relative.
        largest: Strengths beyond this are not tried.
        evaluations: Largest number of strengths to try.
        level: Of the interval.
        batch: Texts in one forward pass.
        seed: Of what the meter samples, and of the bootstrap.
        progress: Show a bar.

    Raises:
        TypeError: the budget is no `meter <= limit`.
        ValueError: a limit that is not positive, no prompts; an argument that the controller's method does not change
            without a refit, or that is a list.
    """
    if not isinstance(budget, Budget):
        raise TypeError(f"budget is a {type(budget).__name__}; write meter <= limit, as in evaluate.kl() <= 0.3")
    bench = Bench(model, prompts, batch=batch, seed=seed)
    return search(
        bench,
        [Arm("calibrated", controller)],
        budget,
        argument=argument,
        tolerance=tolerance,
        largest=largest,
        evaluations=evaluations,
        level=level,
        progress=progress,
    )


def search(
    bench: Bench,
    arms: Sequence[Arm],
    budget: Budget,
    *,
    argument: str = STRENGTH,
    tolerance: float = 0.04,
    largest: float = 64.0,
    evaluations: int = 12,
    level: float = 0.95,
    progress: bool = True,
) -> Calibration:
    """As `calibrate`, on a bench, for an arm with a controller.

    Args:
        arms: If several, such as random directions, they share one strength: the items are dealt to them in turn.
    """
    limit, meter = budget.limit, budget.meter
    if not limit > 0:
        raise ValueError(f"the budget {budget} is not positive")
    items = meter.over(bench)
    if not items:
        raise ValueError("no prompts; give at least one")
    name, controller = arms[0].name, arms[0].controller
    assert controller is not None
    start, slope, known = _begin(controller, argument), 2.0, False
    with counting(evaluations, desc=f"calibrate {name}", progress=progress) as shown:
        if len(items) >= 2 * COARSE:
            fewer = replace(meter, items=tuple(items[:: len(items) // COARSE]))
            part = _Curve(bench, arms, fewer, argument, shown.update)
            found, met, _ = _find(part, limit, max(tolerance, COARSELY), largest, evaluations, start)
            if met == MET:
                start, slope, known = found, part.slope(limit), len(part.measured) > 1
        curve = _Curve(bench, arms, meter, argument, shown.update)
        strength, met, note = _find(curve, limit, tolerance, largest, evaluations, start, slope)
        if met == MET and len(curve.measured) < 2 and not known:
            curve(0.9 * strength)  # the interval needs a slope
    points = tuple((s, meter.pool(values)) for s, values in sorted(curve.measured.items()))
    reached = dict(points).get(strength, curve.at_rest)
    settled = met == MET and not note
    bounds = _bounds(curve.measured, slope, meter.at, limit, level, bench.seed) if settled else (math.nan, math.nan)
    chosen = _turned(arms[0], argument, strength)
    assert chosen.controller is not None
    final = chosen.controller * chosen.strength
    return Calibration(final, strength, bounds, points, met, reached, str(budget), note, argument)


def _begin(controller: Controller, argument: str) -> float:
    """Where a search begins: at what the controller has, if that is a positive number."""
    if argument == STRENGTH:
        return 1.0
    present = (controller.recipe.get("arguments") or {}).get(argument)
    if isinstance(present, (list, tuple)):
        raise ValueError(f"{argument}={present}; only a single number can be searched")
    return float(present) if isinstance(present, (int, float)) and present > 0 else 1.0


def _turned(arm: Arm, argument: str, value: float) -> Arm:
    """An arm with another strength, or its controller with another value of an argument."""
    if argument == STRENGTH:
        return replace(arm, strength=value, instruction="")
    assert arm.controller is not None
    return replace(arm, controller=arm.controller.retuned(**{argument: value}), strength=1.0, instruction="")


class _Curve:
    """A meter's value against the strength; each strength is measured once."""

    def __init__(self, bench: Bench, arms: Sequence[Arm], meter: Meter, argument: str, tick: Callable[[], Any]):
        self._bench, self._arms, self._meter, self._argument, self._tick = bench, arms, meter, argument, tick
        self.measured: dict[float, Values] = {}
        # a KL is 0 without control, but not at any level of 0; other meters have a level of their own
        self.at_rest = 0.0 if meter.name == "KL" and argument == STRENGTH else self(0.0)

    @property
    def origin(self) -> str:
        """What the value at 0 is of."""
        return "the unsteered model" if self._argument == STRENGTH else f"{self._argument} 0"

    def __call__(self, strength: float) -> float:
        if strength not in self.measured:
            log, key = self._bench.log, ["search", self._arms[0].name, len(self._meter.over(self._bench)), strength]
            if log is None:
                self.measured[strength] = self._measure(strength)
            else:
                self.measured[strength] = log[key] if key in log else log.put(key, self._measure(strength))
            self._tick()
        return self._meter.pool(self.measured[strength])

    def _measure(self, strength: float) -> Values:
        arms = [_turned(arm, self._argument, strength) for arm in self._arms]
        if len(arms) == 1 or strength == 0:
            off = strength == 0 and self._argument == STRENGTH
            return self._meter(self._bench, UNSTEERED if off else arms[0])
        items = tuple(self._meter.over(self._bench))
        values: Values = [[] for _ in items]
        for number, arm in enumerate(arms[: len(items)]):
            dealt = slice(number, None, len(arms))
            values[dealt] = replace(self._meter, items=items[dealt])(self._bench, arm)
        return values

    def slope(self, limit: float) -> float:
        """Of the value in logarithms, between the two strengths whose values are nearest to the limit."""
        points = [(math.log(s), math.log(v)) for s in self.measured if s > 0 and (v := self(s)) > 0 and v < math.inf]
        nearest = sorted(points, key=lambda point: abs(point[1] - math.log(limit)))[:2]
        if len(nearest) < 2:
            return 2.0
        (s0, v0), (s1, v1) = nearest
        return min(max((v1 - v0) / (s1 - s0), 0.5), 6.0)


def _find(
    value: _Curve,
    limit: float,
    tolerance: float,
    largest: float,
    evaluations: int,
    strength: float = 1.0,
    slope: float = 2.0,
) -> tuple[float, str, str]:
    """Strength, verdict and note; the search begins at a strength, with a slope in logarithms."""
    if value.at_rest > limit:
        return 0.0, NEVER, f"{value.origin} has {value.at_rest:.3g}"
    low, high = 0.0, math.inf
    known: list[tuple[float, float]] = []
    for _ in range(evaluations):
        found = value(strength)
        known.append((strength, found))
        # NaN: the model broke
        if found <= limit:
            low = max(low, strength)
        else:
            high = min(high, strength)
        if abs(found / limit - 1) <= tolerance:
            return strength, MET, ""
        if low >= largest or (low > 0 and high / low < 1 + tolerance / 4):
            break
        strength = _next(known, limit, low, min(high, 2 * largest), largest, slope)
    return _outside(dict(known), limit, low, high, largest)


def _next(
    known: list[tuple[float, float]], limit: float, low: float, high: float, largest: float, slope: float
) -> float:
    """A strength where the line through the two nearest values in logarithms meets the limit."""
    usable = [(math.log(s), math.log(v)) for s, v in known if v > 0 and math.isfinite(v)]
    below = [point for point in usable if point[1] <= math.log(limit)]
    above = [point for point in usable if point[1] > math.log(limit)]
    start = usable[-1] if usable else (math.log(known[-1][0]), math.log(limit) - 4)
    if below and above:
        a, b = max(below), min(above)
        slope, start = (b[1] - a[1]) / (b[0] - a[0]) if b[0] > a[0] else 2.0, a
    elif len(usable) > 1:
        a, b = sorted(usable)[:2] if above else sorted(usable)[-2:]
        slope, start = (b[1] - a[1]) / (b[0] - a[0]), (a if above else b)
    slope = min(max(slope, 0.5), 6.0)
    guess = math.exp(start[0] + (math.log(limit) - start[1]) / slope)
    if low > 0 and high < math.inf and above:
        inside = (
            math.exp(0.1 * math.log(high) + 0.9 * math.log(low)),
            math.exp(0.9 * math.log(high) + 0.1 * math.log(low)),
        )
        # a secant that would leave the bracket, or creep along its edge, is replaced by the middle
        crept = len(known) > 5 and len(known) % 2
        return math.sqrt(low * high) if crept or not inside[0] <= guess <= inside[1] else guess
    return min(max(guess, known[-1][0] / 16), known[-1][0] * 8, largest)


def _outside(
    known: dict[float, float], limit: float, low: float, high: float, largest: float
) -> tuple[float, str, str]:
    """The verdict if no strength was found at which the value is the limit."""
    if low == 0 or known[low] < NEGLIGIBLE * limit:
        reason = f"already {high:.3g} gives {known[high]:.3g}" if high < math.inf else "it changes nothing"
        return low, NOTHING, reason
    if high == math.inf:
        return low, MET, f"the value stays below the budget up to {low:.3g}: {known[low]:.3g}"
    return low, MET, f"the value goes from {known[low]:.3g} at {low:.4g} to {known[high]:.3g} at {high:.4g}"


def _bounds(
    measured: dict[float, Values], slope: float, at: str, limit: float, level: float, seed: int
) -> tuple[float, float]:
    """Where bootstrapped curves cross the limit, in logarithms between the strengths that were tried.

    If all items were measured at one strength only, the slope is that of the search's beginning.
    """
    strengths = sorted(s for s in measured if s > 0)
    n = len(measured[strengths[0]])
    crossings = []
    for chosen in draws(n, resamples=400, seed=seed).tolist():
        values = [pooled([measured[s][index] for index in chosen], at) for s in strengths]
        crossings.append(_crossing(strengths, values, limit, slope))
    return ends(torch.tensor(crossings, dtype=torch.float64), n, level)


def _crossing(strengths: list[float], values: list[float], limit: float, slope: float) -> float:
    points = [(math.log(s), math.log(v)) for s, v in zip(strengths, values, strict=True) if v > 0]
    goal = math.log(limit)
    if len(points) == 1 == len(strengths):
        return math.exp(points[0][0] + (goal - points[0][1]) / slope)
    if len(points) < 2:
        return math.nan
    # beyond what was tried the nearest line goes on
    right = next((index for index, (_, v) in enumerate(points) if v >= goal), len(points) - 1)
    (s0, v0), (s1, v1) = points[max(right, 1) - 1], points[max(right, 1)]
    slope = (v1 - v0) / (s1 - s0)
    return math.exp(s0 + (goal - v0) / slope) if slope > 0.1 else math.nan
