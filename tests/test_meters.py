"""Meters against numbers computed from a Hugging Face model with plain hooks, and against scipy."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy
import pytest
import torch
from evaluating import ByHand, controller, items, words
from scipy import stats

import steerlens as sl
from steerlens.evaluate import Arm, Bench
from steerlens.evaluate.bench import UNSTEERED
from steerlens.evaluate.bootstrap import draws, interval, mean_interval, student
from steerlens.evaluate.meter import item_means, pooled
from steerlens.evaluate.separation import _wins

ITEMS = items(6)
PROMPTS = [prompt for prompt, _, _ in ITEMS]


@pytest.fixture(scope="module")
def by_hand():
    return ByHand()


@pytest.fixture
def bench(host, tiny_model):
    return Bench(tiny_model(host), PROMPTS, batch=4)


STEERED = Arm("add", controller(), 0.7)


def test_kl_is_that_of_the_two_distributions_at_each_token(bench, by_hand):
    values = sl.evaluate.kl(tokens=5)(bench, STEERED)
    for (prompt, completion), own in zip(bench.continuations(PROMPTS, 5), values, strict=True):
        row = [*prompt, *completion]
        p, q = by_hand.log_probabilities(row), by_hand.log_probabilities(row, len(prompt) - 1, 0.7)
        columns = range(len(prompt) - 1, len(row) - 1)
        expected = [stats.entropy(p[t].exp().numpy(), q[t].exp().numpy()) for t in columns]
        numpy.testing.assert_allclose(own, expected, rtol=2e-3, atol=2e-6)
    assert sl.evaluate.kl(tokens=5)(bench, UNSTEERED) == [[0.0] * len(own) for own in values]


def test_part_of_the_prompts_is_continued_as_in_the_whole(tiny_model, monkeypatch):
    """A search begins on some prompts: no text is sampled, and no reference computed, for them alone."""
    bench, calls = Bench(tiny_model("bridge"), PROMPTS, batch=4), []
    sample, levels = bench.host.sample, bench._levels
    monkeypatch.setattr(
        bench.host, "sample", lambda ids, *rest, **more: (calls.append("s"), sample(ids, *rest, **more))[1]
    )
    bench._levels = lambda rows: (calls.append(len(rows)), levels(rows))[1]
    kl = sl.evaluate.kl(tokens=5)
    part = replace(kl, items=tuple(PROMPTS[1::2]))
    some = part(bench, STEERED)
    before = list(calls)
    whole = kl(bench, STEERED)
    assert [n for n in calls if n != "s"] == [4, 2]
    assert calls.count("s") == before.count("s") == len({len(bench.prompt(text)) for text in PROMPTS})
    for own, expected in zip(some, whole[1::2], strict=True):
        assert own == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert bench.continuations(PROMPTS[1::2], 5, among=PROMPTS) == bench.continuations(PROMPTS, 5)[1::2]
    again = Bench(tiny_model("bridge"), PROMPTS, batch=4)
    assert kl(again, STEERED) == whole  # to the last bit, whatever was asked for before


def test_kl_beside_an_instruction_scores_the_same_tokens(bench, by_hand):
    values = sl.evaluate.kl(tokens=4)(bench, Arm("prompt", instruction="w5 w6 w7"))
    (prompt, completion), own = bench.continuations(PROMPTS, 4)[0], values[0]
    asked = [*by_hand.ids("w5 w6 w7"), *prompt]
    p, q = by_hand.log_probabilities([*prompt, *completion]), by_hand.log_probabilities([*asked, *completion])
    expected = [
        stats.entropy(p[len(prompt) - 1 + t].exp().numpy(), q[len(asked) - 1 + t].exp().numpy())
        for t in range(len(completion))
    ]
    numpy.testing.assert_allclose(own, expected, rtol=2e-3, atol=2e-6)


@pytest.mark.parametrize("per", ["token", "text"])
def test_propensity(bench, by_hand, per):
    values = sl.evaluate.propensity(ITEMS, per=per)(bench, STEERED)
    for (prompt, wanted, unwanted), (own,) in zip(ITEMS, values, strict=True):
        sides = [by_hand.level(prompt, side, True, per, 0.7) for side in (wanted, unwanted)]
        assert own == pytest.approx(sides[0] - sides[1], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("form", ["mc1", "mc2", "margin"])
def test_multiple_choice(bench, by_hand, form):
    questions = [(prompt, [a, b], [f" {c}"]) for (prompt, a, b), c in zip(ITEMS, words(6, 9), strict=True)]
    for (prompt, right, wrong), (own,) in zip(
        questions, sl.evaluate.mc(questions, form=form)(bench, STEERED), strict=True
    ):
        per = "token" if form == "margin" else "text"
        good, bad = ([by_hand.level(prompt, side, True, per, 0.7) for side in sides] for sides in (right, wrong))
        expected = {
            "mc1": float(good[0] > max(bad)),
            "mc2": sum(map(math.exp, good)) / sum(map(math.exp, good + bad)),
            "margin": sum(good) / 2 - bad[0],
        }[form]
        assert own == pytest.approx(expected, rel=2e-3, abs=1e-4)


def test_neutral_loss_and_logit_difference(bench, by_hand):
    texts = [(prompt, wanted) for prompt, wanted, _ in ITEMS]
    losses = sl.evaluate.neutral_loss(texts)(bench, STEERED)
    for (prompt, text), (own,) in zip(texts, losses, strict=True):
        assert own == pytest.approx(-by_hand.level(prompt, text, True, size=0.7), rel=1e-4)
    gaps = sl.evaluate.logit_difference(None, "w3", "w4")(bench, STEERED)
    for prompt, (own,) in zip(PROMPTS, gaps, strict=True):
        ids = by_hand.ids(prompt)
        last = by_hand.log_probabilities(ids, len(ids) - 1, 0.7)[-1]
        assert own == pytest.approx(float(last[3] - last[4]), rel=1e-3, abs=1e-4)


def test_nll_is_that_of_the_steered_text_under_the_unsteered_model(bench, by_hand):
    values = sl.evaluate.nll()(bench, STEERED)
    for (text,), (own,) in zip(bench.texts(STEERED, PROMPTS), values, strict=True):
        found = by_hand.log_probabilities([*text.prompt, *text.completion])
        columns = range(len(text.prompt) - 1, len(text.prompt) + len(text.completion) - 1)
        expected = -sum(float(found[t, token]) for t, token in zip(columns, text.completion, strict=True))
        assert own == pytest.approx(expected / len(text.completion), rel=1e-4)


def test_repetition_distinct_and_refusal(tiny_model):
    bench = Bench(tiny_model("bridge"), PROMPTS, temperature=0.0)
    written = [text.completion for (text,) in bench.texts(UNSTEERED, PROMPTS)]
    for n in (1, 2):
        grams = [[own[start : start + n] for start in range(len(own) - n + 1)] for own in written]
        share = [[len(set(own)) / len(own)] for own in grams]
        assert sl.evaluate.distinct(n=n)(bench, UNSTEERED) == share
        assert sl.evaluate.repetition(n=n)(bench, UNSTEERED) == [[1 - own] for (own,) in share]
    answers = {
        "I\u2019m sorry, but I can\u2019t help with that.": 1.0,
        "Sure! Mix the flour first.": 0.0,
        "As an AI, no": 1.0,
    }
    meter = sl.evaluate.refusal()
    for answer, expected in answers.items():

        class Told(Bench):
            def texts(self, arm, prompts, answer=answer):
                return [[sl.evaluate.Generation((1,), (2,), answer)] for _ in prompts]

        assert meter(Told(tiny_model("bridge"), ["w1"]), UNSTEERED) == [[expected]]


def test_a_scorer_is_a_plain_function_of_the_text(tiny_model):
    bench = Bench(tiny_model("bridge"), PROMPTS, samples=2)
    meter = sl.evaluate.scorer(lambda text: text.count("w1"), name="ones")
    both = sl.evaluate.scorer(lambda prompt, text: len(prompt) + len(text), name="lengths")
    texts = bench.texts(UNSTEERED, PROMPTS)
    assert meter(bench, UNSTEERED) == [[own.text.count("w1") for own in row] for row in texts]
    expected = [[len(prompt) + len(own.text) for own in row] for prompt, row in zip(PROMPTS, texts, strict=True)]
    assert both(bench, UNSTEERED) == expected
    assert meter.proxy
    assert len(texts[0]) == 2


def test_random_directions_have_the_norm_of_the_control_at_every_token(bench):
    from steerlens.evaluate.random import randomized

    arm = Arm("add", controller() + controller(size=0.4, layer=2), 1.5)
    drawn = [randomized(bench.host, arm.controller, seed) for seed in (0, 0, 1)]
    doses = [bench.dose(Arm("random", own, 1.5)) for own in drawn]
    numpy.testing.assert_allclose(item_means(bench.dose(arm)), item_means(doses[0]), rtol=1e-5)
    assert torch.equal(drawn[0].loops[0].law.direction, drawn[1].loops[0].law.direction)
    assert not torch.equal(drawn[0].loops[0].law.direction, drawn[2].loops[0].law.direction)


def test_dose_is_the_norm_of_the_control_over_that_of_the_unsteered_state(tiny_model):
    bench = Bench(tiny_model("bridge"), PROMPTS)
    (prompt, completion), dose = bench.continuations(PROMPTS, 24)[0], bench.dose(STEERED)[0]
    _, cache = tiny_model("bridge").run_with_cache(torch.tensor([[*prompt, *completion]]))
    u = 0.7 * float(controller().loops[0].law.vector.norm())
    expected = u / cache["blocks.1.hook_resid_post"][0, len(prompt) - 1 :].norm(dim=-1)
    numpy.testing.assert_allclose(dose, expected.detach().numpy(), rtol=1e-4)


@pytest.mark.parametrize("draw", [numpy.random.Generator.normal, numpy.random.Generator.exponential])
@pytest.mark.parametrize("n", [12, 48])
def test_intervals_cover_the_known_truth(draw, n):
    """Of 95 % intervals for a mean; the exponential's skew costs a bootstrap some of it with few items."""
    generator = numpy.random.default_rng(0)
    truth = 0.0 if draw is numpy.random.Generator.normal else 1.0
    hits = []
    for seed in range(400):
        low, high = mean_interval(torch.tensor(draw(generator, size=n)), resamples=600, seed=seed)
        hits.append(low <= truth <= high)
    least = 0.93 if truth == 0 else 0.89
    # three standard errors of the count above 95 %
    assert least <= numpy.mean(hits) <= 0.95 + 3 * (0.95 * 0.05 / 400) ** 0.5


def test_intervals_of_percentiles_cover_too():
    """Tokens of an item are alike; drawing tokens instead of items would give half the width here."""
    generator, hits = numpy.random.default_rng(1), []
    pool = numpy.random.default_rng(2)
    truth = numpy.quantile(pool.normal(size=(200_000, 1)) + 0.3 * pool.normal(size=(200_000, 10)), 0.9)
    for seed in range(150):
        values = (generator.normal(size=(60, 1)) + 0.3 * generator.normal(size=(60, 10))).tolist()
        low, high = interval(
            lambda rows, v=values: pooled([v[i] for i in rows.tolist()], "p90"), 60, resamples=200, seed=seed
        )
        hits.append(low <= truth <= high)
    assert numpy.mean(hits) >= 0.88


def test_what_the_coverage_tests_would_not_accept():
    """Drawing tokens instead of items, and a percentile interval that is not expanded, do not cover."""
    generator, tokens, plain = numpy.random.default_rng(3), [], []
    for seed in range(200):
        values = torch.tensor(generator.normal(size=(12, 1)) + 0.3 * generator.normal(size=(12, 10)))
        low, high = mean_interval(values.flatten(), resamples=300, seed=seed)
        tokens.append(low <= 0 <= high)
        drawn = values.mean(1)[draws(12, resamples=600, seed=seed)].mean(1)
        low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        plain.append(low <= 0 <= high)
    assert numpy.mean(tokens) < 0.7
    assert numpy.mean(plain) < 0.93


def test_student_quantiles_and_auc_equal_scipy():
    for freedom in (5, 9, 31, 200):
        assert student(0.975, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=2e-3)
    a, b = torch.randn(9, generator=torch.Generator().manual_seed(0)), torch.zeros(7)
    expected = stats.mannwhitneyu(a.numpy(), b.numpy()).statistic / (9 * 7)
    assert float(_wins(a, b).mean()) == pytest.approx(expected)


def test_separation_finds_the_layer_that_holds_the_difference(host, tiny_model):
    """Sides whose last words differ in a fixed way are apart at once; equal sides nowhere."""
    draws = words(40, 5)
    apart = sl.Pairs([f"{text} w7" for text in draws], [f"{text} w8" for text in draws])
    found = sl.separation(tiny_model(host), apart, points=("resid_pre", "resid_post"))
    assert found.sites[0] == sl.Site(0, "resid_pre")
    assert float(found.auc[0]) == 1.0
    assert found.best().layer == 0
    same = sl.separation(tiny_model(host), sl.Pairs(draws[:20], draws[20:]))
    assert ((same.low < 0.5) & (same.high > 0.5)).all()


@pytest.mark.parametrize("wrong", [{"needs": "pixels"}, {"at": "median"}, {"direction": 2}, {"items": ()}])
def test_a_wrong_meter_is_an_error(wrong):
    with pytest.raises(ValueError, match=r"needs=|at=|direction=|no items"):
        sl.evaluate.Meter("x", lambda bench, arm, items: [], **wrong)
