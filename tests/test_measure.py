"""The commands that measure, on a tiny model and pairs from a file."""

from __future__ import annotations

import json

import pytest
from evaluating import items
from typer.testing import CliRunner

import steerlens as sl
from steerlens.cli.__main__ import app
from steerlens.cli.measure import write_between
from steerlens.cli.task import INSTRUCTIONS, METHODS, Fit, task_of


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.jsonl"
    rows = [{"prompt": prompt, "positive": a, "negative": b} for prompt, a, b in items(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def call(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_compare_prints_numbers_and_goes_on_from_its_file(own, tmp_path):
    file = tmp_path / "run.jsonl"
    arguments = ["compare", "--model", "tiny", "--pairs", own, "--method", "caa", "--method", "caa:layers=all"]
    arguments += ["--budget", "0.05", "--seeds", "1", "--file", file, "--instruction", "w1 w2", "--json"]
    first = json.loads(call(*arguments).splitlines()[-1])
    assert [row["arm"] for row in first["table"]] == ["unsteered", "prompt", "random", "caa", "caa, every layer"]
    assert first["calibrations"]["caa"]["value"] == pytest.approx(0.05, rel=0.04)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[: len(lines) // 2]))
    assert json.loads(call(*arguments).splitlines()[-1]) == first
    assert file.read_text().splitlines(keepends=True) == lines


def test_calibrate_writes_a_controller_that_meets_the_budget(own, tmp_path):
    save = tmp_path / "c.safetensors"
    printed = call("calibrate", "--model", "tiny", "--pairs", own, "--budget", "0.05", "--save", save, "--json")
    found = json.loads(printed.splitlines()[-1])
    assert found["met"] == "met"
    assert sl.Controller.load(save).loops[0].strength == found["strength"]


def test_sweep_names_the_best_place(own, tmp_path):
    printed = call(
        "sweep",
        "--model",
        "tiny",
        "--pairs",
        own,
        "--layers",
        "0,2",
        "--strengths",
        "1,2",
        "--file",
        tmp_path / "s.jsonl",
    )
    assert "best within KL mean <= 0.3: layer" in printed
    assert printed.count("| layer 2 |") == 2


def test_a_task_keeps_a_half_that_no_controller_sees(own):
    task = task_of("sentiment", own, "Be glad.", None)
    assert (len(task.fit), len(task.effect.items)) == (8, 8)
    seen = set(task.fit.positive)
    assert not any(wanted in seen for wanted, _ in task.effect.items)
    assert task.effect.instruction == "Be glad."
    for concept in INSTRUCTIONS:
        shipped = task_of(concept, None, None, 10)
        assert len(shipped.effect.items) == 10
        assert shipped.effect.name == ("propensity" if isinstance(shipped.fit.positive[0], tuple) else "log likelihood")


def test_methods_are_named_with_options(tiny_model):
    model, data = tiny_model("bridge"), sl.Pairs([[5, 9, 12]], [[5, 9, 13]])
    assert Fit("caa:layers=all,strength=2", model, data, "all")().layers == [0, 1, 2, 3]
    assert Fit("caa:layers=1-2", model, data, None)().layers == [1, 2]
    with pytest.raises(ValueError, match="no method 'coo'"):
        Fit("coo", model, data, None)
    with pytest.raises(ValueError, match="name=value"):
        Fit("caa:layers", model, data, None)
    assert all(Fit(spec, model, data, None).digest for spec in METHODS)


def test_a_page_is_written_between_its_markers(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- steerlens compare -->\nold\n<!-- end of compare -->\nafter\n")
    write_between(path, "new")
    assert path.read_text() == "before\n<!-- steerlens compare -->\nnew\n<!-- end of compare -->\nafter\n"
    path.write_text("nothing")
    with pytest.raises(ValueError, match="lacks the markers"):
        write_between(path, "new")
