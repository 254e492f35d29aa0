"""Evaluations: what they promise of their numbers, their files and their tables."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evaluating import controller, items, words

import steerlens as sl
from steerlens.core import Loop
from steerlens.evaluate.bootstrap import mean_interval
from steerlens.evaluate.log import Log
from steerlens.models import tiny

ITEMS = items(12)
CHEAP = {"seeds": 2, "progress": False, "max_new_tokens": 6}


def effect():
    return sl.evaluate.propensity(ITEMS, instruction="w1 w2 w3")


def costs():
    return [sl.evaluate.kl(tokens=6), sl.evaluate.fluency()]


@pytest.fixture(scope="module")
def found(tiny_model):
    return sl.evaluate(tiny_model("bridge"), controller(), effect(), damage=costs(), strengths=(0, 1, 2), **CHEAP)


def test_the_row_of_strength_0_equals_unsteered_bit_for_bit(found):
    for meter in found.meters:
        assert found.values("controller", 0, meter) == found.values("unsteered", 0.0, meter)
        assert found.values("controller", 1, meter) != found.values("unsteered", 0.0, meter)


def test_a_model_that_is_not_the_same_twice_is_not_evaluated():
    model = tiny("gpt2").train()  # drops out at random
    with pytest.raises(RuntimeError, match="at strength 0 changes the logits"):
        sl.evaluate(model, controller(), effect(), damage=[], **CHEAP)


@pytest.mark.parametrize("where", [slice(300, 400), "prompt"])
def test_a_controller_that_changes_no_scored_logit_is_an_error(tiny_model, where):
    idle = (
        sl.Controller([Loop(sl.Add(torch.zeros(32)), sl.Site(1, "resid_post"))])
        if where == "prompt"
        else controller(where)
    )
    with pytest.raises(RuntimeError, match="changes no scored logit"):
        sl.evaluate(tiny_model("bridge"), idle, effect(), damage=costs(), baselines=(), strengths=(1,), **CHEAP)


def test_a_meter_that_differs_at_strength_0_is_an_error(tiny_model):
    steered = sl.evaluate.Meter(
        "steered", lambda bench, arm, own: [[float(arm.controller is not None)] for _ in own], items=(1, 2)
    )
    with pytest.raises(RuntimeError, match="controller at strength 0 differs from the unsteered model on steered"):
        sl.evaluate(tiny_model("bridge"), controller(), effect(), damage=[steered], strengths=(0,), **CHEAP)


def test_random_directions_share_the_items_of_what_is_a_mean(found):
    """Two directions have half of the prompts each for the KL, all items for the effect, and one dose."""
    own = [one for one in found.measured if (one.arm, one.strength) == ("random", 1)]
    assert {(one.seed, one.meter): len(one.values) for one in own if one.meter != "fluency"} == {
        (0, "propensity"): 12,
        (1, "propensity"): 12,
        (0, "KL"): 6,
        (1, "KL"): 6,
        (0, "dose"): 8,
    }
    dealt = {one.seed: one.values for one in own if one.meter == "KL"}
    assert found.values("random", 1, "KL") == [dealt[item % 2][item // 2] for item in range(12)]
    rows = found.items.loc["random"]
    column = rows[(rows.strength == 1) & (rows.seed == 1)].set_index("item")["KL"].dropna()
    assert list(column.index) == list(range(1, 12, 2))
    assert list(column) == [sum(values) / len(values) for values in dealt[1]]


def test_the_kl_has_an_interval_over_items(found):
    values = torch.tensor([sum(item) / len(item) for item in found.values("controller", 1, "KL")])
    row = found.table().loc["controller"].set_index("strength").loc[1]
    assert (row["KL low"], row["KL high"]) == pytest.approx(mean_interval(values))
    assert f"| {row['KL mean']:.3g} [{row['KL low']:.3g} {row['KL high']:.3g}] |" in found.card()
    # the fluency of the unsteered model is a level of its own
    assert not {"fluency low", "propensity low"} & set(found.table().columns)


def test_the_table_is_a_view_of_the_items(found):
    table, rows = found.table(), found.items
    plain = rows.loc["unsteered"]["propensity"].to_numpy()
    for strength in (1, 2):
        own = rows.loc["controller"]
        change = own[own.strength == strength]["propensity"].to_numpy() - plain
        line = table.loc["controller"][table.loc["controller"].strength == strength].iloc[0]
        assert line.effect == pytest.approx(change.mean())
        assert line["wrong way"] == pytest.approx((change < 0).mean())
        assert line.worst == pytest.approx(change.min())  # a tenth of twelve items is one
        assert line.low < line.effect < line.high
    assert set(table.index) == {"unsteered", "prompt", "random", "controller"}
    assert len(rows.loc["random"]) == 2 * 2 * 12  # strengths, seeds, items
    assert table.loc["unsteered", "fluency"] == 1.0


def test_slopes_are_those_of_a_line_through_each_items_changes(found):
    import numpy

    changes = torch.stack([found.change("controller", s) for s in (0, 1, 2)]).numpy()
    expected = numpy.polyfit([0, 1, 2], changes, 1)[0]
    numpy.testing.assert_allclose(found.slopes("controller").numpy(), expected)


def test_the_card_names_proxies_baselines_and_what_was_not_measured(found, tiny_model):
    card = found.card()
    assert "random x2" in card
    assert "proxies: fluency" in card
    assert "not measured: knowledge" in card
    assert "slope per item: median" in card
    bare = replace(effect(), instruction="")
    without = sl.evaluate(tiny_model("bridge"), controller(), bare, damage=[], strengths=(1,), **CHEAP)
    assert "not measured: a prompt baseline" in without.card()


def test_the_figure_draws_each_method_and_the_random_band(found):
    figure = found.plot()
    assert [trace.name for trace in figure.data] == ["unsteered", "prompt", "random x2", "random x2", "controller"]
    assert len(figure.layout.shapes) == 2
    assert figure.layout.xaxis.title.text == "KL (nats/token)"


def test_numbers_are_the_same_on_every_host(found, host, tiny_model):
    other = sl.evaluate(
        tiny_model(host),
        controller(),
        effect(),
        damage=[sl.evaluate.kl(tokens=6)],
        strengths=(1,),
        baselines=(),
        **CHEAP,
    )
    for meter in ("propensity", "KL"):
        own, expected = (torch.tensor(sum(one.values("controller", 1, meter), [])) for one in (other, found))  # noqa: RUF017
        torch.testing.assert_close(own, expected, rtol=2e-3, atol=1e-4)


def compared(model, file=None, **options):
    methods = {"caa": controller(), "late": controller(layer=2), "prompt": sl.prompt("w9 w8")}
    given = (
        {"budget": sl.evaluate.kl(tokens=6) <= 0.1, "damage": [sl.evaluate.fluency()], "file": file} | CHEAP | options
    )
    return sl.compare(model, methods, effect(), **given)


def test_methods_are_compared_at_one_budget_on_items_that_it_was_not_chosen_on(tiny_model):
    result = compared(tiny_model("bridge"), prompts=words(80, 2))
    for name in ("random", "caa", "late"):
        chosen = result.calibrations[name]
        assert chosen["met"] == "met"
        assert chosen["value"] == pytest.approx(0.1, rel=0.04)
        strength = next(s for arm, s in result.arms if arm == name)
        assert strength == chosen["strength"]
        table = result.table()
        assert table.loc[name, "KL mean"] == pytest.approx(0.1, rel=0.25)  # of 40 prompts of 6 tokens
        assert table.loc[name, "KL mean"] != chosen["value"]
    # of the items themselves half is held out, unless other prompts were used for the choice
    assert len(result.change("caa", result.calibrations["caa"]["strength"])) == 12
    half = compared(tiny_model("bridge"), damage=[], seeds=1)
    assert len(half.change("caa", half.calibrations["caa"]["strength"])) == 6
    mean, low, high = result.difference("caa", "late")
    assert low <= mean <= high


def test_an_interrupted_run_goes_on_and_ends_as_an_uninterrupted_one(tiny_model, tmp_path):
    model, path = tiny_model("bridge"), tmp_path / "run.jsonl"
    calls, done = [], []

    def stopping(after):
        def measure(bench, arm, own):
            calls.append(arm.name)
            if len(calls) == after:
                raise KeyboardInterrupt
            done.append((arm.name, arm.strength, arm.seed))
            return kl.function(bench, arm, own)

        return replace(kl, function=measure)

    kl = sl.evaluate.kl(tokens=6)
    whole = compared(model, budget=stopping(10**9) <= 0.1)
    once, done[:] = list(done), []
    for after in (3, 9, 10**9):
        calls.clear()
        try:
            last = compared(model, path, budget=stopping(after) <= 0.1)
        except KeyboardInterrupt:
            assert after < 10**9
    assert last.measured == whole.measured or [m.values for m in last.measured] == [m.values for m in whole.measured]
    assert "unsteered" not in calls  # it was in the file
    assert len(done) - len(once) <= 2 * (
        CHEAP["seeds"] - 1
    )  # but the directions of the two strengths that were stopped at
    text = path.read_text()
    path.write_text(text[:-20])  # as a kill leaves it: the last line is cut
    again = compared(model, path)
    assert [repr(m.values) for m in again.measured] == [repr(m.values) for m in whole.measured]
    assert path.read_text() == text


def test_a_file_that_was_cut_anywhere_goes_on(tmp_path):
    path, protocol = tmp_path / "run.jsonl", {"seed": 0}
    known = {"a": [[1.0, math.nan]], "b": [[2.0]], "c": "\u00e9"}

    def fill():
        log = Log(path, protocol)
        held = [key for key in known if key in log]
        for key, value in known.items():
            if key not in log:
                log.put(key, value)
        return held

    fill()
    text = path.read_bytes()
    ends = [place for place, byte in enumerate(text, start=1) if byte == ord("\n")]
    for size in range(len(text)):
        path.write_bytes(text[:size])
        assert fill() == list(known)[: max(sum(end <= size for end in ends) - 1, 0)]
        assert path.read_bytes() == text


def test_a_killed_process_leaves_a_file_that_goes_on(tmp_path, tiny_model):
    path, here = tmp_path / "run.jsonl", Path(__file__).parent
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_evaluate import compared; "
        "from steerlens.models import tiny; compared(tiny(), sys.argv[2])"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(here), str(path)], cwd=here.parent)
    while child.poll() is None and (not path.exists() or path.read_text().count("\n") < 4):
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    before = path.read_text()
    result = compared(tiny_model("bridge"), path)
    assert path.read_text().startswith(before.rpartition("\n")[0])
    assert [repr(m.values) for m in result.measured] == [
        repr(m.values) for m in compared(tiny_model("bridge")).measured
    ]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed is 1, it was 0"),
        ({"prompts": words(12, 7)}, "prompts.digest"),
        ({"budget": sl.evaluate.kl(tokens=6) <= 0.2}, "budget"),
        ({"temperature": 0.0}, "texts.temperature"),
    ],
)
def test_a_file_of_another_protocol_is_refused(tiny_model, tmp_path, change, named):
    model, path = tiny_model("bridge"), tmp_path / "run.jsonl"
    compared(model, path, damage=[], seeds=1)
    before = path.read_text()
    with pytest.raises(ValueError, match=f"another protocol.*{named}"):
        compared(model, path, damage=[], seeds=1, **change)
    assert path.read_text() == before
    header = json.loads(before.splitlines()[0])["protocol"]
    assert {"versions", "model", "dtype", "seed", "prompts", "meters", "arms", "device"} <= set(header)


def test_another_controller_is_another_protocol(tiny_model, tmp_path):
    path, options = tmp_path / "run.jsonl", {"damage": [], "baselines": (), "strengths": (1,)} | CHEAP
    sl.evaluate(tiny_model("bridge"), controller(), effect(), file=path, **options)
    with pytest.raises(ValueError, match=r"controller\.digest"):
        sl.evaluate(tiny_model("bridge"), controller(size=1.001), effect(), file=path, **options)
    path.write_text("something else\n{}\n")
    with pytest.raises(ValueError, match="no evaluation of steerlens"):
        sl.evaluate(tiny_model("bridge"), controller(), effect(), file=path, **options)


def test_a_method_is_fitted_only_if_something_is_to_be_measured_on_it(tiny_model, tmp_path):
    fitted = []

    def fit():
        fitted.append(1)
        return controller()

    for _ in range(2):
        sl.compare(
            tiny_model("bridge"),
            {"caa": fit},
            effect(),
            budget=sl.evaluate.kl(tokens=6) <= 0.1,
            damage=[],
            file=tmp_path / "run.jsonl",
            **CHEAP,
        )
    assert len(fitted) == 1


def test_a_sweep_chooses_on_one_half_and_reports_on_the_other(tiny_model):
    """Item i has the effect of the layer, but for layer 1, which helps on the items of the choice only."""
    table = {0: lambda i: 1.0, 1: lambda i: 9.0 * (i % 2 == 0), 2: lambda i: 5.0}
    size = {0: 0.1, 1: 0.1, 2: 0.9}

    def of(arm):
        return None if arm.controller is None else arm.controller.sites[0].layer

    aim = sl.evaluate.Meter(
        "aim",
        lambda bench, arm, own: [[0.0 if of(arm) is None else table[of(arm)](i)] for i in own],
        items=tuple(range(12)),
        prompts=tuple(words(12, 0)),
    )
    harm = sl.evaluate.Meter("harm", lambda bench, arm, own: [[size.get(of(arm), 0.0)] for _ in own], direction=-1)
    found = sl.sweep(
        tiny_model("bridge"),
        lambda layer, strength: controller(layer=layer) * strength,
        aim,
        damage=[harm],
        layers=range(3),
        strengths=(1.0,),
        progress=False,
    )
    best = found.choose("harm", 1.0)
    assert (best.arm, best.layer, best.effect, best.damage) == ("layer 1", 1, 0.0, pytest.approx(0.1))
    assert found.choose("harm", 0.05 + 0.1).arm == "layer 1"
    with pytest.raises(ValueError, match=r"no row has a harm of at most .* the least is 0\.1 of layer 0"):
        found.choose("harm", 0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: sl.compare(m, {}, effect(), budget=sl.evaluate.kl() <= 1), "name at least one"),
        (lambda m: sl.compare(m, {"random": controller()}, effect(), budget=sl.evaluate.kl() <= 1), "like a baseline"),
        (lambda m: sl.evaluate(m, controller(), effect(), baselines=("placebo",)), "baselines .*placebo"),
        (lambda m: sl.evaluate(m, controller(), sl.evaluate.scorer(len)), "no prompts"),
        (lambda m: sl.evaluate(m, controller(), effect(), damage=[effect()]), "two meters"),
        (lambda m: sl.prompt(" "), "empty"),
    ],
)
def test_mistakes_are_named_before_anything_is_measured(tiny_model, call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_model("bridge"))
