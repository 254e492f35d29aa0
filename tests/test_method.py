"""The decorator of methods: recipes, checks, and that one file and one line make a method."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

import steerlens as sl
from steerlens.core import POINTS
from steerlens.fit.card import Card
from steerlens.fit.method import declared, exported, method
from steerlens.fit.reading import contrast_means, pick_layers
from steerlens.fit.recipe import plain
from steerlens.testing import Case, discover_hosts, discover_methods

PAIRS = sl.Pairs([[1, 2, 3]], [[4, 5, 6]])


@method(card=Card(needs="sets", points=POINTS))
def halfway(model, data, *, layers=None, sign: Literal[1, -1] = 1, strength=1.0, where="last", extra=None):
    """Add half the difference."""
    (site,) = pick_layers(model, layers, "resid_post", default="middle")
    positive, negative = contrast_means(model, data, [site])
    law = sl.Add(sign * (positive[site] - negative[site]) / 2)
    return sl.Controller([sl.Loop(law, site, where=where, strength=strength)], {"norm": law.vector.norm()})


@pytest.fixture
def model(tiny_model):
    return tiny_model(discover_hosts()[0])


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.arange(3), [0, 1, 2]),
        (torch.tensor(2.0), 2.0),
        (torch.tensor([1, 2], dtype=torch.int32), [1, 2]),
        (range(2, 8, 2), [2, 4, 6]),
        ((1, (2.5, None)), [1, [2.5, None]]),
        ({3, 1}, [1, 3]),
        ({1: slice(0, None)}, {"1": {"slice": [0, None, None]}}),
        (sl.Site(2), "blocks.2.hook_resid_post"),
        (PAIRS, {"pairs": PAIRS.digest()}),
        (float("inf"), "inf"),
        (torch.nn.Linear(2, 2), "Linear"),
        (torch.float16, "torch.float16"),
        (Path("a/b"), str(Path("a/b").__repr__())),
        (halfway, "halfway"),
        (object(), "object"),
        ((each for each in "ab"), "generator"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_recipe_is_plain_json_whatever_was_passed(model, given, kept):
    recipe = halfway(model, PAIRS, extra=given).recipe
    assert recipe["arguments"]["extra"] == kept
    assert type(recipe["arguments"]["extra"]) is type(kept)
    assert json.loads(json.dumps(recipe, allow_nan=False)) == recipe


def test_a_large_tensor_is_its_shape_and_hash():
    big = torch.arange(100.0).view(4, 25)
    assert plain(big) == plain(big.clone()) == plain(big.numpy())
    assert plain(big)["shape"] == [4, 25]
    assert plain(big)["sha256"] != plain(big + 1)["sha256"]
    assert plain(big.bfloat16())["dtype"] == "bfloat16"


def test_a_recipe_holds_what_was_asked_and_what_was_found(model):
    controller = halfway(model, PAIRS, layers=np.int64(-2), strength=3.0)
    recipe = controller.recipe
    assert list(recipe) == ["method", "steerlens", "arguments", "found", "model", "data"]
    assert recipe["method"] == "halfway"
    assert recipe["arguments"] == {"layers": -2, "sign": 1, "strength": 3.0, "where": "last", "extra": None}
    assert recipe["found"]["norm"] == pytest.approx(float(controller.loops[0].law.vector.norm()))
    assert recipe["data"] == PAIRS.digest()
    assert controller.layers == [2]
    assert [loop.name for loop in controller.loops] == ["halfway"]


def test_data_are_hashed_one_by_one_and_as_texts(model):
    other = sl.Pairs([[7, 2, 3]], [[4, 5, 8]])
    assert sl.pid(model, [PAIRS, other]).recipe["data"] == [PAIRS.digest(), other.digest()]
    one, two = (sl.track(model, [[1, 2, last]], progress=False).recipe["data"] for last in (3, 4))
    assert one != two
    assert sl.track(model, [torch.tensor([1, 2, 3])], progress=False).recipe["data"] == one


def test_a_method_looks_like_the_function_that_was_written():
    signature = inspect.signature(sl.caa)
    assert list(signature.parameters)[:3] == ["model", "data", "layers"]
    assert signature.parameters["strength"].default == 1.0
    assert signature.return_annotation == "Controller"
    assert sl.caa.__doc__.startswith("Add the mean difference")
    assert inspect.getsource(sl.caa).startswith("@method(")
    assert sl.caa.__annotations__["strength"] == "float"


def test_mistakes_in_a_call_are_named_with_the_method(model):
    for call, kind, words in (
        (lambda: halfway(model), TypeError, r"halfway\(\) missing a required argument: 'data'"),
        (lambda: halfway(model, PAIRS, 3), TypeError, r"halfway\(\) too many positional arguments"),
        (lambda: halfway(model, PAIRS, sing=1), TypeError, r"halfway\(\) got an unexpected keyword argument 'sing'"),
        (lambda: halfway(model, PAIRS, sign=0), ValueError, "sign=0; it is one of 1, -1"),
        (lambda: halfway(model, PAIRS, where="first"), ValueError, "where='first'"),
        (lambda: halfway(model, PAIRS, strength=[1.0, 0.5]), TypeError, r"strength=\[1.0, 0.5\]; it is one number"),
        (lambda: halfway(model, PAIRS, strength=float("nan")), ValueError, "strength=nan; it must be finite"),
        (lambda: halfway(model, PAIRS, layers="some"), TypeError, "layers='some'; give a layer's number"),
        (lambda: halfway(model, PAIRS, layers=1.5), TypeError, "layers=1.5; give a layer's number"),
        (lambda: halfway(model, [1, 2]), TypeError, "data is a list; give steerlens.Pairs"),
        (lambda: halfway(torch.nn.Linear(2, 2), PAIRS), TypeError, "cannot steer a torch.nn"),
    ):
        with pytest.raises(kind, match=words):
            call()
    halfway(model=model, data=PAIRS)  # by keyword as well


def test_mistakes_in_a_declaration_are_named():
    card = Card(needs="sets", points=POINTS)
    with pytest.raises(TypeError, match="its first two arguments are model and data"):
        method(card=card)(lambda network, data: None)
    with pytest.raises(TypeError, match="'paper', which is no argument of it"):
        method(card=card, paper={"form": "add"})(lambda model, data, *, form: None)


def test_the_papers_settings_stand_in_for_what_is_not_given():
    case = Case("pid", discover_hosts()[0])
    own, published, mixed = (
        case.fit(**given).recipe["arguments"] for given in ({}, {"paper": True}, {"paper": True, "kp": 0.3})
    )
    assert (own["kp"], own["kd"], own["origin"]) == (0.05, 0.0, None)
    assert (published["kp"], published["kd"], published["origin"], published["level"]) == (0.7, 0.1, "zero", 1.0)
    assert (mixed["kp"], mixed["kd"], mixed["origin"]) == (0.3, 0.1, "zero")


def test_one_notion_has_one_argument_name():
    """Every method names where it acts `layers` and its factor `strength`; angles are in radians."""
    for name, known in exported(sl.methods).items():
        names = set(inspect.signature(known.function).parameters)
        assert {"model", "data", "layers", "strength"} <= names, name
        assert not names & {"layer", "k", "count", "heads", "condition_layers", "angle", "angle_deg"}, name
        assert not any(each.endswith(("_deg", "degrees")) for each in names), name


@pytest.mark.parametrize("name", ["lqr", "pid", "track", "odesteer", "cold_kernel", "cold_fd", "caa", "angular"])
def test_strength_is_a_factor_on_the_control(name):
    case = Case(name, discover_hosts()[0])
    whole, half = case.controller, case.fit(strength=0.5)
    for a, b in zip(whole.loops, half.loops, strict=True):
        assert b.strength == pytest.approx(0.5 * a.strength, rel=1e-6)
        assert repr(type(a.law)) == repr(type(b.law))
    assert half.recipe["arguments"]["strength"] == 0.5


@pytest.mark.parametrize("name", ["lqr", "pid"])
def test_level_zero_holds_at_the_origin_or_is_off_and_strength_zero_is_off(name):
    case = Case(name, discover_hosts()[0])
    ids = torch.tensor([case.prompt])
    plain = case.logits(ids)
    with case.steer(controller=case.fit(level=0.0, origin="zero")):
        assert not torch.equal(case.logits(ids), plain)
    with case.steer(controller=case.fit(level=0.0)):
        assert torch.equal(case.logits(ids), plain)
    with case.steer(controller=case.fit(level=2.0, strength=0.0)):
        assert torch.equal(case.logits(ids), plain)


def test_what_is_no_method_declares_nothing():
    assert declared(sl.steer) is None
    assert declared(sl.caa).name == "caa"
    with pytest.raises(TypeError, match="is no method"):
        Case(sl.steer, discover_hosts()[0])


NEW = '''"""A method of one file."""

from __future__ import annotations

from typing import Any

from steerlens.core import Controller, Loop, POINTS
from steerlens.fit.card import Card
from steerlens.fit.contrast import Pairs
from steerlens.fit.method import method
from steerlens.fit.reading import contrast_means, pick_layers
from steerlens.laws.feedback import Add


@method(card=Card(needs="sets", points=POINTS))
def brand_new(
    model: Any,
    data: Pairs,
    *,
    layers: Any = None,
    point: str = "resid_post",
    strength: float = 1.0,
    where: Any = "last",
) -> Controller:
    """Add half the mean difference.

        u = s (m+ - m-) / 2

    Args:
        model: Any.
        data: Contrast texts.
        layers: Default the middle one.
        point: Point of the block.
        strength: s, no unit.
        where: Token positions.

    Returns:
        One loop per layer. Recorded signals: `u`, `u_norm`.

    Raises:
        ValueError: a layer that the model does not have.

    Source: A. Nobody, On halves (arXiv 2501.00001).
    """
    sites = pick_layers(model, layers, point, default="middle")
    positive, negative = contrast_means(model, data, sites)
    return Controller(
        [Loop(Add((positive[s] - negative[s]) / 2), s, where=where, strength=strength) for s in sites]
    )
'''

ASK = """
import json, sys
from typer.testing import CliRunner
import steerlens as sl
from steerlens.cli.__main__ import app
from steerlens.cli.catalogue import method_table
from steerlens.testing import Case, checks, discover_hosts, discover_methods, run_check

run = lambda *words: CliRunner().invoke(app, words).output
case = Case("brand_new", discover_hosts()[0])
for check in checks():
    if check.__name__ in ("check_docstring", "check_card", "check_zero_is_no_steering", "check_saves_and_loads"):
        run_check(check, case)
print(json.dumps({
    "discovered": "brand_new" in discover_methods(),
    "public": "brand_new" in dir(sl) and callable(sl.brand_new),
    "table": [row for row in method_table().splitlines() if row.startswith("| `brand_new`")],
    "listed": run("methods"),
    "cited": run("cite", "brand_new"),
}))
"""


@pytest.fixture
def copy(tmp_path):
    """A copy of the package with a new method, and a Python that runs on it."""
    shutil.copytree(Path(sl.__file__).parent, tmp_path / "steerlens", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "steerlens/methods/brand_new.py").write_text(NEW)

    def python(code):
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path
        )

    return tmp_path / "steerlens/methods/__init__.py", python


def test_one_file_and_one_line_make_a_method(copy):
    pytest.importorskip("typer")
    exports, python = copy
    with exports.open("a") as file:
        file.write("from steerlens.methods.brand_new import brand_new as brand_new\n")
    result = python(ASK)
    assert result.returncode == 0, result.stderr
    answers = json.loads(result.stdout.splitlines()[-1])
    assert answers["discovered"]
    assert answers["public"]
    (row,) = answers["table"]
    assert "| two sets of texts | any point | no |" in row
    assert row.endswith("| arXiv 2501.00001 |")
    assert "brand_new    Add half the mean difference." in answers["listed"]
    assert "eprint = {2501.00001}" in answers["cited"]
    assert "note = {A. Nobody, On halves (arXiv 2501.00001).}" in answers["cited"]


def test_a_forgotten_line_is_reported_by_name(copy):
    result = copy[1]("import steerlens.testing as t; t.discover_methods()")
    assert "does not export brand_new; add the line from steerlens.methods.brand_new import" in result.stderr


def test_every_file_of_methods_is_exported():
    files = {path.stem for path in (Path(sl.__file__).parent / "methods").glob("*.py")} - {"__init__"}
    assert set(discover_methods()) == files
    assert files <= set(sl.__all__)
