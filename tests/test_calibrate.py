"""A strength for a budget: the search on curves that are known, and KL on prompts that it was not chosen on."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy
import pytest
import torch
from evaluating import controller, items, words

import steerlens as sl
from steerlens.evaluate import Arm, Bench, Meter, calibration


def known(function, count=1, name="known"):
    """A meter that gives a function of the strength for each item."""
    return Meter(
        name,
        lambda bench, arm, own: [[function(arm.strength, i)] for i in range(count)],
        direction=-1,
        items=tuple(range(count)),
    )


def search(model, meter, limit, **options):
    return sl.calibrate(model, controller(), ["w1 w2 w3"], budget=meter <= limit, progress=False, **options)


@pytest.mark.parametrize("scale", [1e-4, 0.02, 1.0, 50.0, 1e4])
@pytest.mark.parametrize(
    "curve",
    [
        lambda s: s**2,
        lambda s: s**2 / (1 + s),
        lambda s: s**3 + 0.1 * s,
        lambda s: (s + 0.1 * s**0.5) ** 1.2,
        lambda s: s**2 if s < 0.5 else 0.25 + 4 * (s - 0.5),
    ],
)
def test_the_search_is_short_and_meets_the_budget(tiny_model, curve, scale):
    found = search(tiny_model("bridge"), known(lambda s, _: scale * curve(s), name="KL"), 0.3, largest=1e4)
    assert found.met == "met"
    assert not found.note
    assert found.value == pytest.approx(0.3, rel=0.04)
    assert found.value == pytest.approx(scale * curve(found.strength))
    assert len(found.curve) <= 8


def test_with_many_prompts_only_the_last_evaluations_need_all(tiny_model):
    """v_i = a_i s^2 / (1 + s): the search begins on a few items, and ends on all."""
    a = numpy.random.default_rng(0).gamma(4, 0.25, size=200)
    asked = []

    def measure(bench, arm, own):
        asked.append(len(own))
        return [[50 * a[i] * arm.strength**2 / (1 + arm.strength)] for i in own]

    meter = Meter("KL", measure, direction=-1, items=tuple(range(200)))
    found = search(tiny_model("bridge"), meter, 0.3)
    assert found.met == "met"
    assert found.value == pytest.approx(50 * a.mean() * found.strength**2 / (1 + found.strength))
    assert found.value == pytest.approx(0.3, rel=0.04)
    assert asked.count(200) == len(found.curve) <= 3
    assert max(n for n in asked if n < 200) <= 30


def test_one_evaluation_on_all_prompts_is_enough_if_the_search_on_some_hits(tiny_model):
    """v = s^2 for each item: the coarse search ends at the limit, and its slope gives the interval."""
    meter = known(lambda s, i: (1 + 0.1 * (i % 3 - 1)) * s**2, 192, "KL")
    meter = replace(meter, function=lambda bench, arm, own: [[(1 + 0.1 * (i % 3 - 1)) * arm.strength**2] for i in own])
    found = search(tiny_model("bridge"), meter, 0.3, tolerance=0.1)
    assert len(found.curve) == 1
    low, high = found.interval
    # a has a standard deviation of .0816, so sqrt(.3 / mean a) one of .0816 / 2 sqrt(192), relative
    assert low < 0.3**0.5 < high
    assert high / low == pytest.approx(1 + 1.96 * 0.0816 / 192**0.5, rel=0.01)


def test_random_directions_share_the_strength_at_which_they_spend_the_budget_together(tiny_model):
    """Direction k costs (k + 1) s^2: the mean over items dealt to directions 0, 1 and 2 in turn is 2 s^2."""
    arms = [Arm("random", controller(), seed=number) for number in range(3)]
    met = []

    def measure(bench, arm, own):
        met.append((arm.seed, own))
        return [[(arm.seed + 1) * arm.strength**2] for _ in own]

    meter = Meter("KL", measure, direction=-1, items=tuple(range(12)))
    found = calibration.search(Bench(tiny_model("bridge"), ["w1"]), arms, meter <= 0.5, progress=False)
    assert found.strength == pytest.approx(0.5, rel=0.03)
    assert {seed: own for seed, own in met} == {k: tuple(range(k, 12, 3)) for k in range(3)}


def test_a_jump_is_reported_with_the_strength_below_it(tiny_model):
    found = search(
        tiny_model("bridge"), known(lambda s, _: 0.1 * s if s < 0.8 else 5.0, name="KL"), 0.3, evaluations=16
    )
    assert found.met == "met"
    assert 0.75 < found.strength < 0.8
    assert "goes from" in found.note


def test_budgets_that_cannot_be_met_or_are_met_by_doing_nothing(tiny_model):
    model = tiny_model("bridge")
    never = search(model, known(lambda s, _: 3.2 + s), 3.0)
    assert (never.met, never.strength) == ("never", 0.0)
    assert "3.2" in never.note
    jump = search(model, known(lambda s, _: 4.0 if s else 0.0, name="KL"), 0.3)
    assert jump.met == "by doing nothing"
    idle = search(model, known(lambda s, _: 0.0, name="KL"), 0.3)
    assert idle.met == "by doing nothing"
    saturated = search(model, known(lambda s, _: 0.2 * s / (1 + s), name="KL"), 0.3)
    assert saturated.met == "met"
    assert "stays below" in saturated.note


def test_a_model_that_breaks_is_not_within_the_budget(tiny_model):
    found = search(tiny_model("bridge"), known(lambda s, _: s**2 if s < 3 else math.nan, name="KL"), 0.3)
    assert found.value == pytest.approx(0.3, rel=0.04)


def test_the_interval_covers_the_strength_that_fits_all_prompts(tiny_model):
    """v_i = a_i s^2 with E a = 1: on all prompts the limit 0.3 is met at sqrt(0.3)."""
    generator, truth, hits = numpy.random.default_rng(0), 0.3**0.5, []
    for _ in range(120):
        a = generator.gamma(4, 0.25, size=32)
        low, high = search(tiny_model("bridge"), known(lambda s, i, a=a: a[i] * s**2, 32, "KL"), 0.3).interval
        hits.append(low <= truth <= high)
        assert high / low < 1.6
    assert numpy.mean(hits) >= 0.88


@pytest.mark.parametrize("method", ["caa", "repe", "mimic", "odesteer", "lqr", "angular"])
def test_kl_is_within_a_tenth_of_the_budget_on_other_prompts(tiny_model, method):
    model, texts = tiny_model("bridge"), items(24)
    data = sl.Pairs([(a, b) for a, b, _ in texts], [(a, c) for a, _, c in texts])
    options = {"progress": False} if method == "lqr" else {}
    fitted = getattr(sl, method)(model, data, **options)
    meter = sl.evaluate.kl(tokens=12)
    found = sl.calibrate(model, fitted, words(320, 3), budget=meter <= 0.1, progress=False, batch=64)
    held = Bench(model, words(320, 4), batch=64)
    value = meter.pool(meter(held, Arm("held", found.controller)))
    if found.note:  # it cannot be scaled to the budget
        assert value < 0.1
    else:
        assert value == pytest.approx(0.1, rel=0.1)
        assert found.interval[0] < found.strength < found.interval[1]


def test_the_calibrated_controller_is_the_given_one_scaled(host, tiny_model):
    model = tiny_model(host)
    found = sl.calibrate(
        model, controller(), words(12, 3), budget=sl.evaluate.kl(tokens=6, at="p95") <= 0.5, progress=False
    )
    assert torch.equal(found.controller.loops[0].law.vector, controller().loops[0].law.vector)
    assert found.controller.loops[0].strength == found.strength
    assert found.table().loc[found.strength, "value"] == found.value
    assert "KL p95 <= 0.5: met" in repr(found)


def test_what_is_no_budget_is_an_error(tiny_model):
    model = tiny_model("bridge")
    with pytest.raises(TypeError, match="meter <= limit"):
        sl.calibrate(model, controller(), ["w1"], budget=0.3)
    with pytest.raises(ValueError, match="not positive"):
        search(model, sl.evaluate.kl(), 0.0)
    with pytest.raises(ValueError, match="no prompts"):
        sl.calibrate(model, controller(), [], budget=sl.evaluate.kl() <= 0.3)


@pytest.mark.parametrize("method", ["lqr", "pid"])
def test_a_level_is_searched_without_a_refit(tiny_model, method):
    """As many blocks are run as for the KL at those levels alone, and the outcome is what a fit at that level gives."""
    model, budget = tiny_model("bridge"), sl.evaluate.kl(tokens=6) <= 0.2
    data = sl.Pairs([f"{a} {b}" for a, b, _ in items(8)], [f"{a} {c}" for a, _, c in items(8)])
    options = {"progress": False} if method == "lqr" else {}
    fitted, prompts, passes = getattr(sl, method)(model, data, level=0.5, **options), words(12, 3), [0]
    first = model.blocks[0].original_component.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        found = sl.calibrate(model, fitted, prompts, budget=budget, argument="level", progress=False)
        searching = sum(passes)
        del passes[:]
        bench = Bench(model, prompts)
        levels = [level for level, _ in found.curve]
        for level in levels:
            budget.meter(bench, Arm("again", fitted.retuned(level=level)))
        assert searching == sum(passes)
    finally:
        first.remove()
    assert found.met == "met"
    assert found.value == pytest.approx(0.2, rel=0.04)
    assert dict(found.curve)[0.0] == 0.0
    assert 0.5 in levels  # it begins at the level of the fit
    wanted = getattr(sl, method)(model, data, level=found.strength, **options)
    for loop, other in zip(found.controller, wanted, strict=True):
        assert torch.allclose(loop.law.law.setpoint.level, other.law.law.setpoint.level, rtol=1e-6)
        assert loop.strength == other.strength == 1.0
    assert "level" in repr(found)
    assert found.plain()["argument"] == found.table().index.name == "level"


def test_an_argument_that_cannot_be_searched_is_an_error(tiny_model):
    model, budget = tiny_model("bridge"), sl.evaluate.kl(tokens=4) <= 0.2
    data = sl.Pairs(["w1 w2", "w3 w4"], ["w5 w6", "w7 w8"])
    with pytest.raises(ValueError, match="no argument 'level'; caa changes without a refit: strength"):
        sl.calibrate(model, sl.caa(model, data), ["w1 w2"], budget=budget, argument="level")
    two = sl.pid(model, [data, data[:1]], level=[1.0, 0.5])
    with pytest.raises(ValueError, match="only a single number"):
        sl.calibrate(model, two, ["w1 w2"], budget=budget, argument="level")
    # from zero a level of 0 is not off: it holds the feature at 0
    flat = sl.pid(model, data, origin="zero", kp=1.0)
    found = sl.calibrate(
        model, flat, ["w1 w2"], budget=sl.evaluate.kl(tokens=4) <= 1e-6, argument="level", progress=False
    )
    assert (found.met, found.strength) == ("never", 0.0)
    assert "level 0 has" in found.note
