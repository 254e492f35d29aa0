"""Every slow loop has a bar, one switch silences them all, and what is quick shows none."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import steerlens as sl
from steerlens.core.progress import DELAY_S, bar, counting

CODE = """
import time
from steerlens.core.progress import bar, counting
for _ in bar(range(4), desc="a slow loop"):
    time.sleep({pause})
with counting(4, desc="another") as shown:
    for _ in range(4):
        time.sleep({pause})
        shown.update()
"""


@pytest.mark.parametrize(("pause", "switch", "seen"), [(0.5, None, True), (0.5, "1", False), (0.01, None, False)])
def test_a_bar_is_shown_for_what_is_slow_unless_it_is_silenced(pause, switch, seen):
    environment = os.environ | {"PYTHONPATH": str(Path(sl.__file__).parents[1])}
    environment.pop("TQDM_DISABLE", None)
    environment |= {} if switch is None else {"TQDM_DISABLE": switch}
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(pause=pause)], env=environment, capture_output=True, text=True, check=True
    )
    assert ("a slow loop" in done.stderr and "another" in done.stderr) is seen
    assert done.stdout == ""


def test_the_switch_counts_at_any_time(monkeypatch):
    def disabled(**options):
        with counting(3, desc="x", **options) as shown:
            return shown.disable

    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert disabled()
    monkeypatch.setenv("TQDM_DISABLE", "0")
    assert not disabled()
    assert disabled(progress=False)
    assert list(bar(["a", "b"], desc="x")) == ["a", "b"]
    assert DELAY_S <= 3


@pytest.mark.parametrize("progress", [True, False])
@pytest.mark.parametrize("outer", [["a"], ["a", "b"]])
def test_a_loop_inside_another_is_silent_unless_the_other_has_one_item(outer, progress):
    for _ in bar(outer, desc="outer", progress=progress):
        with counting(3, desc="inner") as shown:
            assert shown.disable is not (progress and len(outer) == 1)
    with counting(3, desc="after") as shown:
        assert not shown.disable


def test_a_loop_that_fails_leaves_the_next_one_its_bar():
    def fail():
        for item in bar([1, 2, 3], desc="x"):
            if item == 2:
                raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    with counting(3, desc="after") as shown:
        assert not shown.disable


def test_there_is_one_mechanism():
    root = Path(sl.__file__).parent
    users = [path for path in root.rglob("*.py") if re.search(r"^\s*(from|import) tqdm", path.read_text(), re.M)]
    assert [path.name for path in users] == ["progress.py"]
