"""A real NDIF server, started once for all remote tests."""

from __future__ import annotations

import os
from functools import cache

import pytest

from .server import missing, ndif_server

RUNNING = pytest.StashKey()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A tiny Llama with random weights, saved where client and server find it."""
    from steerlens.models import tiny

    # the absolute path is the model's name
    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = tiny("llama", host="hf")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def ndif(request, model_dir):
    """The server with its logs, in float32."""
    hint = missing()
    if hint:
        # a machine for continuous integration must not pass by leaving out
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(hint)
    with ndif_server(model_dir) as server:
        request.config.stash[RUNNING] = server
        yield server
        del request.config.stash[RUNNING]


@pytest.fixture(scope="session")
def server(ndif):
    """The address of the server, for `remote=`."""
    return ndif.url


@pytest.fixture
def client(server, model_dir, monkeypatch):
    """The model without its weights, on a client whose `remote=True` means the test server."""
    from nnsight import CONFIG, TransformersModel
    from nnsight.modeling import huggingface

    # else nnsight asks the Hugging Face hub how the name is spelled
    monkeypatch.setitem(huggingface._ID_CACHE, str(model_dir), str(model_dir))
    monkeypatch.setattr(CONFIG.API, "HOST", server)
    monkeypatch.setattr(CONFIG.APP, "REMOTE_LOGGING", False)
    model = TransformersModel(str(model_dir), task="text-generation")
    yield model
    assert not model.dispatched, "the client loaded the weights, so the server need not have done the work"


@pytest.fixture
def untrusted(monkeypatch):
    """Requests go to the process without weights that strangers get."""
    from nnsight.schema.request import RequestModel

    plain = RequestModel.metadata
    monkeypatch.setattr(RequestModel, "metadata", lambda self: plain(self)[:-1] + ',"trusted":false}')


@pytest.fixture(scope="session")
def local():
    """Cases on local weights, each fitted once; `lqr` and `pid` as in their paper, without a second pass."""
    from steerlens.testing import Case

    papers = {"lqr": {"paper": True}, "pid": {"paper": True}}
    return cache(lambda method: Case(method, "nnsight", options=papers.get(method)))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """What the server logged goes with the report of a failed test."""
    outcome = yield
    report = outcome.get_result()
    server = item.config.stash.get(RUNNING, None)
    if report.failed and server is not None:
        report.sections.append(("NDIF server", server.tails()))
