"""Controllers on the Hub: what is pushed is what is loaded, and every fault is one sentence in a built-in exception."""

from __future__ import annotations

import json
import socket
import sys

import pytest
import torch

import steerlens as sl
from steerlens.models import tiny

hub_library = pytest.importorskip("huggingface_hub", reason="needs the extra hub")

from hub_server import READER, TOKEN, Hub  # noqa: E402

NAME = "controller.safetensors"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in that the library's client uses as the Hub, with an empty cache and a token that may write."""
    server = Hub()
    client(monkeypatch, server.url, tmp_path)
    yield server
    server.close()


def client(monkeypatch, url, folder, token=TOKEN):
    constants = hub_library.constants
    # the library reads the environment once, when it is imported
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    monkeypatch.setenv("HF_TOKEN", token)


def controller(strength=1.0):
    return sl.caa(tiny("llama", host="bridge"), sl.Pairs(["w1 w2"], ["w3 w4"]), layers=[1, 2], strength=strength)


def test_what_is_pushed_is_what_is_loaded(hub):
    before = controller()
    url = before.push_to_hub("me/sunny", license="mit")
    assert url == f"{hub.url}/me/sunny/commit/{hub.oid('me/sunny')}"
    after = sl.Controller.from_hub("me/sunny")
    assert after.recipe == before.recipe
    for a, b in zip(after, before, strict=True):
        assert torch.equal(a.law.vector, b.law.vector)
        assert (a.act, a.where, a.strength) == (b.act, b.where, b.strength)
    assert hub.messages["me/sunny"] == [f"Add {before!r}"]
    assert ("POST", "/me/sunny.git/info/lfs/objects/batch") in hub.requests


def test_a_revision_stays_what_it_was(hub):
    controller(1.0).push_to_hub("me/sunny")
    controller(2.0).push_to_hub("me/sunny", message="Twice as strong")
    first, second = (hub.oid("me/sunny", index) for index in (0, 1))
    assert sl.Controller.from_hub("me/sunny", revision=first).loops[0].strength == 1.0
    assert sl.Controller.from_hub("me/sunny", revision=second).loops[0].strength == 2.0
    assert sl.Controller.from_hub("me/sunny").loops[0].strength == 2.0
    assert hub.messages["me/sunny"][1] == "Twice as strong"


def test_a_repository_holds_several_controllers(hub):
    controller(1.0).push_to_hub("me/moods", file="sunny.safetensors")
    controller(-1.0).push_to_hub("me/moods", file="sad.safetensors")
    assert sorted(hub.commits["me/moods"][-1]) == ["README.md", "sad.safetensors", "sunny.safetensors"]
    assert sl.Controller.from_hub("me/moods", file="sad.safetensors").loops[0].strength == -1.0
    with pytest.raises(FileNotFoundError, match=r"^me/moods has no file controller.safetensors; name the controller's"):
        sl.Controller.from_hub("me/moods")


def test_the_cache_serves_without_a_network(hub, monkeypatch):
    controller().push_to_hub("me/sunny")
    first = sl.Controller.from_hub("me/sunny")
    hub.close()
    monkeypatch.setattr(hub_library.constants, "HF_HUB_OFFLINE", True)
    assert sl.Controller.from_hub("me/sunny").recipe == first.recipe
    with pytest.raises(ConnectionError, match=r"^me/other is not in the cache, and HF_HUB_OFFLINE is set$"):
        sl.Controller.from_hub("me/other")
    with pytest.raises(ConnectionError):
        controller().push_to_hub("me/sunny")


def test_no_network_is_one_sentence(monkeypatch, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    client(monkeypatch, url, tmp_path)
    # the client waits 23 s between its trials
    monkeypatch.setattr(hub_library.utils._http.time, "sleep", lambda seconds: None)
    with pytest.raises(ConnectionError, match=f"^me/sunny is not in the cache, and {url} does not answer$"):
        sl.Controller.from_hub("me/sunny")
    with pytest.raises(ConnectionError, match=f"^{url} does not answer: "):
        controller().push_to_hub("me/sunny")


def test_what_is_not_there_is_one_sentence(hub):
    hub.put("you/private", controller__safetensors=b"x")
    hub.private.add("you/private")
    hub.put("you/gated", controller__safetensors=b"x")
    hub.gated.add("you/gated")
    hub.put("you/empty", README__md=b"x")
    with pytest.raises(FileNotFoundError, match=r"^the Hub has no repository me/none, or it is private and your token"):
        sl.Controller.from_hub("me/none")
    with pytest.raises(FileNotFoundError, match=r"^the Hub has no repository you/private, or it is private"):
        sl.Controller.from_hub("you/private", token="hf_other")
    with pytest.raises(PermissionError, match=r"^you/gated asks for its conditions to be accepted at "):
        sl.Controller.from_hub("you/gated")
    with pytest.raises(FileNotFoundError, match=r"^you/empty has no file controller.safetensors"):
        sl.Controller.from_hub("you/empty")
    with pytest.raises(FileNotFoundError, match=r"^you/empty has no revision 'v9'$"):
        sl.Controller.from_hub("you/empty", revision="v9")
    hub.broken = True
    with pytest.raises(OSError, match=r"^you/empty is not in the cache, and http.* answered 501$"):
        sl.Controller.from_hub("you/empty")


def test_a_token_that_may_not_write_is_one_sentence(hub, monkeypatch):
    for token in (READER, ""):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(PermissionError, match=r"^me/sunny cannot be written to .* token of the Hub: hf auth"):
            controller().push_to_hub("me/sunny")
    assert "me/sunny" not in hub.commits


@pytest.mark.parametrize("repo", ["", "a/b/c", "/a", "a/", 3, "me/..", "me/a b", "me/" + "x" * 200])
def test_names_that_are_no_repositories(hub, repo):
    for action in (lambda: sl.Controller.from_hub(repo), lambda: controller().push_to_hub(repo)):
        with pytest.raises(ValueError, match=r"is no repository of the Hub; write user/name$"):
            action()


def test_names_that_are_no_files_of_controllers(hub):
    for file in ("x.bin", "../x.safetensors", "/x.safetensors"):
        with pytest.raises(ValueError, match=r"a name in .safetensors$"):
            sl.Controller.from_hub("me/sunny", file=file)


def test_downloads_are_checked_as_files_are(hub, tmp_path):
    controller().save(tmp_path / "c")
    data = bytearray((tmp_path / "c").read_bytes())
    data[-1] ^= 1
    hub.put("you/altered", controller__safetensors=bytes(data))
    hub.put("you/pickle", controller__safetensors=b"cos\nmkdir\n(S'evil'\ntR.")
    with pytest.raises(ValueError, match=r"^controller.safetensors of you/altered was not loaded: its content is not"):
        sl.Controller.from_hub("you/altered")
    with pytest.raises(ValueError, match=r"of you/pickle was not loaded: it is no safetensors file"):
        sl.Controller.from_hub("you/pickle")


def test_a_controller_that_no_file_holds_is_not_pushed(hub):
    with pytest.raises(TypeError, match="is a callable, which a file cannot hold"):
        controller().at(lambda positions: positions > 2).push_to_hub("me/sunny")
    assert not hub.requests


def test_without_the_library_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ImportError, match=r"^sharing on the Hub needs huggingface_hub; pip install 'steerlens\[hub\]'$"
    ):
        sl.Controller.from_hub("me/sunny")


def test_the_page_says_what_the_recipe_knows(hub):
    whole = controller(0.5) + sl.add(torch.ones(32), layer=3, where=slice(0, None))
    whole.push_to_hub("me/sunny", license="mit", data_license="cc0-1.0", evaluation="| arm | effect |\n| --- | --- |")
    page = hub.commits["me/sunny"][-1]["README.md"].decode()
    head = dict(line.split(": ", 1) for line in page.split("---")[1].strip().splitlines())
    assert json.loads(head["license"]) == "mit"
    assert {"steerlens", "caa", "add"} <= set(json.loads(head["tags"]))
    assert "base_model" not in head
    recipe = whole.recipe["parts"][0]
    for words in (
        'controller = sl.Controller.from_hub("me/sunny")',
        "| method | caa |",
        "| `strength` | 0.5 |",
        f"| data, SHA-256 | {recipe['data']} |",
        "| licence of the data | cc0-1.0 |",
        "| its sizes | n_layers 4, d_model 32, n_heads 4, d_vocab 100 |",
        f"| fingerprint of its weights | &#91;{recipe['model']['probe'][0]}",
        "| blocks.1.hook_resid_post | Add | last | 0.5 |",
        "| blocks.3.hook_resid_post | Add | every token | 1 | 5.657 |",
        "## Evaluation\n\n| arm | effect |",
        "- caa: Rimsky et al. (arXiv 2312.06681).",
        "eprint = {2312.06681}",
        "@software{steerlens,",
    ):
        assert words in page


def test_the_page_loads_the_controller_as_it_says(hub):
    controller().push_to_hub("me/moods", file="sunny.safetensors")
    page = hub.commits["me/moods"][-1]["README.md"].decode()
    lines = page.split("```python\n")[1].split("```")[0].strip().splitlines()
    assert len(lines) == 3
    model = tiny("llama", host="bridge")
    held = {"model": model, "prompt": torch.tensor([[3, 4]])}
    exec("\n".join(lines), held)
    assert held["controller"].layers == [1, 2]


def test_texts_of_a_recipe_cannot_leave_their_cell(hub):
    text = '"]\nlicense: x\n---\n| a |\n<script>[click](javascript:x) ![](http://x)'
    recipe = {"method": text, "arguments": {text: text}, "model": {"name": text, "probe": None}, "data": text}
    sl.Controller(controller().loops, recipe).push_to_hub("me/sunny", license=text)
    page = hub.commits["me/sunny"][-1]["README.md"].decode()
    assert len(page.split("\n---\n", 1)[0].splitlines()) == 4
    assert "<script>" not in page.split("\n---\n", 1)[1]
    assert "](" not in page.split("\n---\n", 1)[1]
    assert all(line.count(" | ") == 1 for line in page.splitlines() if "click" in line and line.startswith("|"))


def test_the_name_of_the_model_becomes_the_base_model(hub):
    recipe = controller().recipe
    recipe["model"]["name"] = "org/Model-1B"
    sl.Controller(controller().loops, recipe).push_to_hub("me/sunny")
    assert 'base_model: ["org/Model-1B"]' in hub.commits["me/sunny"][-1]["README.md"].decode()
