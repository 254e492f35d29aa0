"""The tables of methods in README and docs are what the code says; the conformance suite checks the cards."""

from __future__ import annotations

from pathlib import Path

import pytest

from steerlens.cli.catalogue import END, LONG, SHORT, measured, method_table, short_table, write_table
from steerlens.fit.card import Card
from steerlens.testing import discover_methods

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("page", "start", "table"),
    [("README.md", SHORT, short_table), ("docs/choose_method.md", LONG, method_table)],
)
def test_a_page_has_the_table_that_the_code_gives(page, start, table):
    written = (ROOT / page).read_text(encoding="utf-8").split(start)[1].split(END)[0].strip()
    assert written == table(), f"the table is stale: run steerlens methods --write {page}"


def test_every_method_is_in_the_table_with_a_source():
    rows = {line.split("`")[1]: line for line in method_table().splitlines() if line.startswith("| `")}
    assert list(rows) == sorted(discover_methods())
    assert all("arXiv" in line for line in rows.values())


@pytest.mark.parametrize(("start", "table"), [(SHORT, short_table), (LONG, method_table)])
def test_writing_keeps_what_stands_around_the_table(tmp_path, start, table):
    path = tmp_path / "page.md"
    path.write_text(f"before\n{start}\nold\n{END}\nafter\n", encoding="utf-8")
    write_table(path)
    text = path.read_text(encoding="utf-8")
    assert text == f"before\n{start}\n{table()}\n{END}\nafter\n"
    path.write_text("no markers", encoding="utf-8")
    with pytest.raises(ValueError, match="lacks the markers"):
        write_table(path)


def test_the_measurement_says_where_and_when():
    run = measured()
    assert {"model", "machine", "date", "pairs"} <= set(run)
    assert set(run["methods"]) <= set(discover_methods()), (
        "a measured method is gone: run benchmarks/methods.py --write"
    )


def test_a_card_that_makes_no_sense_is_refused():
    for options, words in (
        ({"needs": "luck", "points": ("z",)}, "needs='luck'; it is one of texts, sets, pairs, completions"),
        ({"needs": "sets", "points": ("residual",)}, "points="),
        ({"needs": "sets", "points": ()}, "points="),
        ({"needs": "sets", "points": ("z",), "derivatives": "all"}, "derivatives='all'"),
    ):
        with pytest.raises(ValueError, match=words):
            Card(**options)


def test_the_command_prints_and_writes_the_table(tmp_path):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from steerlens.cli.__main__ import app

    run = CliRunner().invoke(app, ["methods", "--markdown"])
    assert run.exit_code == 0
    assert run.output.strip() == method_table()
    path = tmp_path / "page.md"
    path.write_text(f"{LONG}\n{END}", encoding="utf-8")
    assert CliRunner().invoke(app, ["methods", "--write", str(path)]).exit_code == 0
    assert method_table() in path.read_text(encoding="utf-8")
