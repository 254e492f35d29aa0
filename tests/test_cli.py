"""`steerlens fit`, `generate`, `doctor`: from a file of pairs to a steered text, and one sentence for each mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import steerlens as sl
from steerlens.models import tiny
from steerlens.sharing.citations import arxiv_number

pytest.importorskip("typer")
from typer.testing import CliRunner

from steerlens import methods
from steerlens.cli.__main__ import app
from steerlens.cli.doctor import examine
from steerlens.fit.method import exported

#: A program started by a test finds the code that is tested, whatever is installed.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(sl.__file__).parents[1])}
PAIRS = [("w1 w2 w3", "w4 w5 w6"), ("w7 w8", "w9 w10"), ("w11 w12 w13", "w14 w15 w16"), ("w17 w18", "w19 w20")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.csv").write_text("positive,negative\n" + "".join(f"{a},{b}\n" for a, b in PAIRS))
    return tmp_path


def call(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments, code=1):
    """What a call that fails writes to stderr: one line, no traceback, and nothing on stdout."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.stderr
    assert not result.stdout.strip()
    words = [line for line in result.stderr.splitlines() if line.startswith("steerlens: ")]
    assert len(words) == 1, result.stderr
    return words[0]


def test_a_fit_is_the_method_on_the_pairs_of_the_file(folder):
    found = json.loads(
        call(
            "fit",
            "pairs.csv",
            "--model",
            "tiny",
            "--layers",
            "1,3",
            "--set",
            "strength=2",
            "-o",
            "c.safetensors",
            "--json",
        )
    )
    expected = sl.caa(tiny(), sl.Pairs(*zip(*PAIRS, strict=True), read="mean"), layers=[1, 3], strength=2.0)
    kept = sl.Controller.load("c.safetensors")
    assert [loop.strength for loop in kept] == [loop.strength for loop in expected]
    for loop, own in zip(kept, expected, strict=True):
        assert torch.equal(loop.law.vector, own.law.vector)
    assert found["sites"] == ["blocks.1.hook_resid_post", "blocks.3.hook_resid_post"]
    assert (found["texts"], found["read"], found["bytes"]) == ([4, 4], "mean", os.path.getsize("c.safetensors"))


def test_generate_writes_what_the_library_writes(folder):
    call("fit", "pairs.csv", "--model", "tiny", "--layer", "2", "-o", "a.safetensors")
    call("fit", "pairs.csv", "--model", "tiny", "-m", "lqr", "-o", "b.safetensors")
    arguments = ["generate", "a.safetensors", "w1 w2", "w3 w4 w5", "--and", "b.safetensors", "--strength", "0.5"]
    found = json.loads(call(*arguments, "--tokens", "5", "--model", "tiny", "--json"))
    model = tiny()
    for row, prompt in zip(found["texts"], ("w1 w2", "w3 w4 w5"), strict=True):
        assert row["prompt"] == prompt
        ids = torch.tensor([model.tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        for name in ("unsteered", "a", "b"):
            tokens = ids
            strength = 0.0 if name == "unsteered" else 0.5
            controller = sl.Controller.load("a.safetensors" if name == "unsteered" else f"{name}.safetensors")
            with sl.steer(model, controller, strength=strength):
                tokens = model.generate(ids, max_new_tokens=5, do_sample=False, return_type="tokens", verbose=False)
            assert row[name] == model.tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
    page = call(*arguments, "--tokens", "5", "--model", "tiny")
    assert "unsteered" in page
    assert found["texts"][0]["a"].split()[0] in page


@pytest.mark.parametrize("host", [pytest.param("hooked", marks=pytest.mark.lens3), "nnsight"])
def test_every_library_fits_and_writes_the_same(folder, host):
    options = ("--model", "tiny", "--layer", "2", "-s", "strength=3")
    call("fit", "pairs.csv", *options, "-o", "a.safetensors")
    assert f"--host {host}" in call("fit", "pairs.csv", *options, "-o", "b.safetensors", "--host", host)
    one, other = (sl.Controller.load(f"{name}.safetensors").loops[0].law.vector for name in "ab")
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    written = ["generate", "a.safetensors", "w1 w2", "--tokens", "5", "--model", "tiny", "--json"]
    there = json.loads(call(*written, "--host", host))
    assert there["host"] == host
    assert there["texts"] == json.loads(call(*written))["texts"]
    assert json.loads(call("inspect", "a.safetensors", "--model", "tiny", "--host", host, "--json"))["fits"]["ok"]


def test_every_method_that_fits_on_pairs_is_fitted_from_a_file(folder):
    (folder / "asked.csv").write_text("prompt,positive,negative\n" + "".join(f"w30 w31,{a},{b}\n" for a, b in PAIRS))
    more = {"tda": ["-s", "error=0.9"]}
    for name in sl.__all__:
        if getattr(getattr(sl, name), "method", None) is None:
            continue
        call("fit", "asked.csv", "--model", "tiny", "-m", name, "-o", f"{name}.safetensors", *more.get(name, ()))
        assert sl.Controller.load(f"{name}.safetensors").recipe["method"] == name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.csv"], "there is no file nowhere.csv"),
        (["."], ". is a folder; give a csv or jsonl file of pairs"),
        (["pairs.csv", "-m", "cca"], "no method 'cca'; did you mean caa?"),
        (["pairs.csv", "-s", "layer=1"], "caa has no option 'layer'; did you mean layers? it takes layers, point"),
        (["pairs.csv", "-s", "strength"], "'strength' is no option; write name=value"),
        (["pairs.csv", "-s", "strength=much"], "caa: strength=much is a text; strength takes a number"),
        (["pairs.csv", "--layers", "first"], "layers=first: 'first' is no layer; write 15, or 3,9, or 5-10, or all"),
        (["pairs.csv", "--layers", "3-1"], "layers=3-1: 3-1 is an empty range; write 1-3"),
        (["pairs.csv", "--layers", "9"], "no layer 9 in a model of 4 layers"),
        (["pairs.csv", "--layers", "1,1"], "layers=1,1 names layer 1 twice"),
        (["pairs.csv", "--layers", "0-99999999"], "no model has a layer 99999999"),
        (["pairs.csv", "--layers", "2", "-s", "layers=1"], "layers is given twice: 2 and 1"),
        (["pairs.csv", "-s", "strength=1e400"], "strength=inf; it must be finite"),
        (["pairs.csv", "-o", "pairs.csv"], "pairs.csv is there and holds no controller"),
        (["pairs.csv", "-o", "c.gguf"], "a controller's file ends in .safetensors; steerlens convert"),
        (["pairs.csv", "-s", "point=residual"], "residual"),
        (["pairs.csv", "-s", "form=multiply"], "form takes add, projection, piecewise"),
        (["pairs.csv", "--read", "middle"], "--read middle: it is one of last, mean, completion, or a position"),
        (["pairs.csv", "--read", "completion"], "read='completion' needs (prompt, completion)"),
        (["pairs.csv", "-o", "nowhere/c.safetensors"], "there is no folder nowhere to write c.safetensors in"),
        (["pairs.csv", "-o", "."], ". is a folder; name a file in it"),
        (["pairs.csv", "--positive", "wanted"], "has no column 'wanted' for positive; its columns are 'positive'"),
        (["pairs.csv", "--model", "no/such-model"], "no model 'no/such-model' was found"),
        (["pairs.csv", "-m", "cold_kernel"], "completion"),
    ],
)
def test_a_mistake_in_a_fit_gets_one_sentence_and_leaves_no_file(folder, arguments, words):
    given = arguments if "--model" in arguments else [*arguments, "--model", "tiny"]
    assert words in refused("fit", *given)
    assert sorted(path.name for path in folder.iterdir()) == ["pairs.csv"]


def test_mistakes_in_generate(folder):
    call("fit", "pairs.csv", "--model", "tiny", "-o", "c.safetensors")
    assert "there is no controller file d.safetensors" in refused("generate", "d.safetensors", "w1")
    assert "pairs.csv was not loaded" in refused("generate", "pairs.csv", "w1")
    assert "c.safetensors is a file, not a prompt" in refused("generate", "c.safetensors", "c.safetensors")
    assert "there is no file p.txt with prompts" in refused("generate", "c.safetensors", "--prompts", "p.txt")
    assert ". is a folder; give a text file with one prompt" in refused("generate", "c.safetensors", "--prompts", ".")
    assert ". is a folder; name a controller's file in it" in refused("generate", ".", "w1")
    (folder / "p.txt").write_bytes(b"caf\xe9\n")
    assert "p.txt is not UTF-8 text (byte 3)" in refused("generate", "c.safetensors", "--prompts", "p.txt")
    (folder / "p.txt").write_text("\n\n")
    assert "p.txt holds no prompts; write one a line" in refused("generate", "c.safetensors", "--prompts", "p.txt")
    tiny_model = ("--model", "tiny")
    assert "the prompt '' has no tokens" in refused("generate", "c.safetensors", "", *tiny_model)
    assert "of tiny has no chat template" in refused("generate", "c.safetensors", "w1", "--chat", *tiny_model)
    result = CliRunner().invoke(app, ["generate", "c.safetensors"])
    assert result.exit_code == 2
    assert "no prompts" in result.output


@pytest.mark.real_model
def test_a_controller_of_another_model_is_refused(folder):
    call("fit", "pairs.csv", "--model", "tiny", "-o", "c.safetensors")
    words = refused("generate", "c.safetensors", "I think", "--model", "smollm2")
    assert "this caa was fitted on another model: n_layers is 30, it was 4" in words


@pytest.mark.real_model
def test_a_csv_steers_a_real_model(folder):
    texts = [(f"The {wet} shone under the sun.", f"The {dry} shone under the sun.") for wet, dry in WORDS]
    (folder / "sea.csv").write_text("wanted;unwanted\n" + "".join(f"{a};{b}\n" for a, b in texts))
    call("fit", "sea.csv", "--layer", "15", "-s", "strength=2", "-o", "sea.safetensors")
    found = json.loads(call("generate", "sea.safetensors", "My favourite place is the", "--tokens", "16", "--json"))
    row = found["texts"][0]
    assert row["sea"] != row["unsteered"]
    assert any(word in row["sea"] for word in ("sea", "ocean", "beach", "water", "wave"))


WORDS = [
    ("sea", "road"),
    ("ocean", "city"),
    ("waves", "cars"),
    ("beach", "street"),
    ("shore", "wall"),
    ("coral", "brick"),
]


def test_help_completion_and_exit_codes_of_the_program(folder):
    program = [sys.executable, "-m", "steerlens.cli"]
    environment = ENVIRONMENT | {
        "_STEERLENS_COMPLETE": "complete_bash",
        "COMP_WORDS": "steerlens fi",
        "COMP_CWORD": "1",
    }
    code = "import sys; sys.argv[0] = 'steerlens'; from steerlens.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["fit"]
    done = subprocess.run([*program, "fit", "nowhere.csv"], env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "steerlens: there is no file nowhere.csv; give a csv or jsonl file of pairs\n"
    done = subprocess.run([*program, "fit", "--layer"], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2


def test_an_interrupt_leaves_no_file(folder):
    """While a file is being written, which is what an interrupt could leave half done."""
    code = (
        "import os, signal, steerlens.core.tensorfile as files\n"
        # a shell starts what it sends to the background with interrupts ignored
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "fsync = os.fsync\n"
        "os.fsync = lambda d: (fsync(d), os.kill(os.getpid(), signal.SIGINT))\n"
        "import sys; sys.argv = ['steerlens', 'fit', 'pairs.csv', '--model', 'tiny', '-o', 'c.safetensors']\n"
        "from steerlens.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 130
    assert "steerlens: stopped; nothing was left half-written" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in folder.iterdir()] == ["pairs.csv"]


def test_doctor_finds_what_is_here_and_what_clashes(monkeypatch):
    import importlib.metadata

    found = json.loads(call("doctor", "--json"))
    assert found["ok"]
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert found["hosts"]["TransformerBridge"] == {"usable": True, "why": ""}
    plain = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.30" if name == "transformers" else plain(name))
    clash = next(line for line in examine()["clashes"] if line.startswith("transformers 5.30"))
    assert "does not go with nnsight, which needs <5.23,>=5.9: pip install 'transformers<5.23,>=5.9'" in clash
    assert "clash" in CliRunner().invoke(app, ["doctor"]).stdout
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 1


def test_doctor_names_a_damaged_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("STEERLENS_CACHE", str(tmp_path))
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{}")
    cache = examine()["cache"]
    assert cache["models"] == ["half"]
    assert "is damaged: tokenizer.json is missing" in cache["fault"]


def test_lists_are_json_too():
    assert {row["name"] for row in json.loads(call("methods", "--json"))} >= {"caa", "lqr"}
    assert {row["architecture"] for row in json.loads(call("models", "--json"))} >= {"gemma2"}
    (entry,) = json.loads(call("cite", "lqr", "--json"))
    assert "2604.19018" in entry["bibtex"]
    papers = {arxiv_number(method.source) or name for name, method in exported(methods).items()}
    assert call("cite").count("@misc{") == len(papers)
    assert "no method 'lqrr'; did you mean lqr?" in refused("cite", "lqrr")
