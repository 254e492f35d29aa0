"""Layers as they are typed on the command line, for options of methods and for files alike."""

from __future__ import annotations

import pytest

from steerlens import methods
from steerlens.fit.method import exported
from steerlens.hosts.dimensions import plain_name

pytest.importorskip("typer")
from steerlens.cli.layers import parse_layers
from steerlens.cli.options import read_options

GOOD = {"15": [15], "3,9": [3, 9], "5-10": [5, 6, 7, 8, 9, 10], "0, 5-6": [0, 5, 6], "9,3": [9, 3], "4-4": [4]}


@pytest.mark.parametrize("text", GOOD)
def test_both_places_read_the_same(text):
    assert parse_layers(text) == GOOD[text]
    found = read_options(exported(methods)["caa"], [f"layers={text}"])["layers"]
    assert ([found] if isinstance(found, int) else found) == GOOD[text]


@pytest.mark.parametrize("text", ["", "x", "9-5", "1,,2", "1-", "-1", "1-2-3", "1,1", "0-3,2", "0-99999999", "1.5"])
def test_anything_else_is_refused_with_what_was_typed(text):
    for read in (parse_layers, lambda typed: read_options(exported(methods)["caa"], [f"layers={typed}"])):
        with pytest.raises(ValueError, match="layers") as refusal:
            read(text)
        assert f"layers={text}" in str(refusal.value)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("org/Model-1B", "org/Model-1B"),
        ("gpt2", "gpt2"),
        ("", ""),
        ("/home/me/models/mine/", "mine"),
        ("./mine", "mine"),
        ("~/models/mine", "mine"),
        (r"C:\models\mine", "mine"),
        ("/home/me/.cache/huggingface/hub/models--org--Model-1B/snapshots/0123abc", "org/Model-1B"),
    ],
)
def test_a_recipe_does_not_tell_where_its_machine_keeps_models(path, name):
    assert plain_name(path) == name
