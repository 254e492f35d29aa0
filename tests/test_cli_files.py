"""`steerlens inspect` and `convert`: what they show and write, and one sentence for each mistake."""

from __future__ import annotations

import json

import pytest
import torch

import steerlens as sl
from steerlens.models import tiny
from steerlens.sharing import from_gguf, from_lm_eval

pytest.importorskip("typer")
from test_cli import call, refused

EVERY = slice(0, None)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fitted = sl.caa(tiny(), sl.Pairs(["w1 w2"], ["w3 w4"]), layers=[1, 2], strength=0.5)
    fitted.save("c.safetensors")
    return tmp_path


def test_inspect_shows_what_a_file_holds(folder):
    words = call("inspect", "c.safetensors", "--model", "tiny")
    kept = sl.Controller.load("c.safetensors")
    norm = float(kept.loops[0].law.vector.norm()) * 0.5
    assert f"c.safetensors: {kept!r}" in words
    assert f"acts at   blocks.1.hook_resid_post: Add, tokens: last, strength 0.5, norm {norm:.4g}" in words
    assert "made by   caa(layers=[1, 2], point=resid_post, strength=0.5" in words
    assert words.endswith("fits      tiny: yes\n")
    found = json.loads(call("inspect", "c.safetensors", "--json"))
    assert found["format"] == "steerlens"
    assert found["recipe"] == kept.recipe
    assert [loop["acts at"] for loop in found["loops"]] == [str(site) for site in kept.sites]
    assert "fits" not in found


def test_inspect_says_why_a_controller_does_not_fit(folder):
    sl.add(torch.ones(16), layer=9).save("other.safetensors")
    found = json.loads(call_failing("inspect", "other.safetensors", "--model", "tiny", "--json"))
    assert not found["fits"]["ok"]
    assert found["fits"]["faults"] == [
        "no hook point 'blocks.9.hook_resid_post' in a model of 4 layers; the last is blocks.3"
    ]
    sl.add(torch.ones(16), layer=1).save("other.safetensors")
    assert "does not fit a state of shape [32]" in call_failing("inspect", "other.safetensors", "--model", "tiny")
    recipe = sl.Controller.load("c.safetensors").recipe
    recipe["model"]["n_layers"] = 12
    sl.Controller(sl.Controller.load("c.safetensors").loops, recipe).save("other.safetensors")
    words = call_failing("inspect", "other.safetensors", "--model", "tiny")
    assert "this caa was fitted on another model: n_layers is 4, it was 12" in words


def call_failing(*arguments):
    from typer.testing import CliRunner

    from steerlens.cli.__main__ import app

    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.stderr
    return result.stdout


def test_texts_of_a_recipe_do_not_steer_the_terminal(folder):
    recipe = {"method": "\x1b[2Jevil\r\n", "arguments": {"\x07": "x" * 5000}}
    sl.Controller(sl.Controller.load("c.safetensors").loops, recipe).save("evil.safetensors")
    words = call("inspect", "evil.safetensors")
    assert all(letter.isprintable() or letter == "\n" for letter in words)
    assert max(map(len, words.splitlines())) < 1100


def test_convert_there_and_back(folder):
    out = call("convert", "c.safetensors", "c.gguf", "--every-token", "--strength", "2")
    assert out.startswith("c.gguf: gguf, from steerlens: Controller(caa: 2 loops at layers 1-2")
    kept, found = sl.Controller.load("c.safetensors"), from_gguf("c.gguf")
    for a, b in zip(kept, found, strict=True):
        assert torch.equal(b.law.vector, a.law.vector * 1.0)
        assert b.where == EVERY
    call("convert", "c.gguf", "back.safetensors", "--layers", "2")
    assert sl.Controller.load("back.safetensors").layers == [2]
    answer = json.loads(call("convert", "c.gguf", "c.pt", "--json"))
    assert (answer["from"], answer["to"]) == ("gguf", "lm-eval")
    assert torch.equal(from_lm_eval("c.pt").loops[0].law.vector, found.loops[0].law.vector)
    call("convert", "c.pt", "specs.json", "--layers", "1")
    specs = json.loads((folder / "specs.json").read_text())
    assert specs == sl.sharing.to_interventions(found.only([1]))


def test_files_of_torch_are_told_apart(folder):
    v = torch.arange(32.0)
    torch.save({1: v, 2: 2 * v}, "tensors.pt")
    torch.save(torch.stack([v, 2 * v, 3 * v, 4 * v]).half(), "direction.pt")
    torch.save({"layer": 2, "bias": v, "base_model": "a/b"}, "baked.pt")
    torch.save({"layers.1": {"steering_vector": v, "action": "clamp", "steering_coefficient": 2.0}}, "lm.pt")
    for name, kind, more, site in (
        ("tensors.pt", "tensors", ["--layers", "2"], "blocks.2.hook_resid_post"),
        ("direction.pt", "hidden-directions", ["--layers", "3"], "blocks.3.hook_resid_post"),
        ("baked.pt", "hidden-directions", ["--model", "tiny"], "blocks.2.hook_mlp_out"),
        ("lm.pt", "lm-eval", [], "blocks.1.hook_resid_post"),
    ):
        found = json.loads(call("inspect", name, *more, "--json"))
        assert found["format"] == kind
        assert [loop["acts at"] for loop in found["loops"]] == [site]
        call("convert", name, "out.safetensors", *more)
        assert [str(site) for site in sl.Controller.load("out.safetensors").sites] == [found["loops"][0]["acts at"]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "none.safetensors"], "there is no file none.safetensors"),
        (["inspect", "text.safetensors"], "text.safetensors was not loaded: it is no safetensors file"),
        (["inspect", "text.gguf"], "text.gguf was not loaded: it is no GGUF file"),
        (["inspect", "text.pt"], "text.pt was not loaded: it is no archive that torch.save wrote"),
        (["inspect", "text.json"], "holds intervention specs, which are written, not read"),
        (["inspect", "c.safetensors", "--from", "onnx"], "--from onnx: the formats that are read are steerlens, gguf"),
        (["inspect", "c.safetensors", "--layers", "one"], "--layers=one: 'one' is no layer; write 15, or 3,9, or 5-10"),
        (["inspect", "c.safetensors", "--layers", "9-5"], "--layers=9-5: 9-5 is an empty range; write 5-9"),
        (
            ["inspect", "c.safetensors", "--host", "nnsight"],
            "--host nnsight says what runs a model; name",
        ),
        (["inspect", "."], "the folder . has no advocate_bias.pt"),
        (["inspect", "c.safetensors", "--layers", "7"], "no loop acts at layers [7]"),
        (["inspect", "c.safetensors", "--model", "tinny"], "tinny"),
        (["convert", "c.safetensors", "c.gguf"], "steers the tokens 'last'; a GGUF control vector steers every token"),
        (
            ["convert", "c.safetensors", "c.xyz"],
            "the name c.xyz has no known ending; use --to: the formats that are written",
        ),
        (["convert", "c.safetensors", "c.gguf", "--to", "tensors"], "--to tensors: the formats that are written are"),
        (["convert", "c.safetensors", "none/c.gguf"], "there is no folder none"),
        (["convert", "c.safetensors", "."], "is a folder"),
        (["convert", "direction.pt", "c.gguf"], "name the layers to use: --layers 15"),
        (["convert", "c.safetensors", "c.gguf", "--strength", "nan"], "finite"),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(folder, arguments, words):
    for name in ("text.safetensors", "text.gguf", "text.pt", "text.json"):
        (folder / name).write_text("a text that is neither of these formats")
    torch.save(torch.ones(4, 32), "direction.pt")
    before = sorted(path.name for path in folder.iterdir())
    assert words in refused(*arguments)
    assert sorted(path.name for path in folder.iterdir()) == before
