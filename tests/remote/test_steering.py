"""Steering on a real NDIF server: every method, the forms of a call, failures, and the tutorial."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nnsight
import pytest
import torch
from nnsight.intervention.backends.remote import RemoteError
from nnsight.schema.request import RequestModel

import steerlens as sl
from remote.server import ndif_server
from steerlens.models import smollm2
from steerlens.testing import Case, check_runs_on_a_server, discover_methods, exceptions

pytestmark = pytest.mark.remote
IDS = torch.tensor([[3, 17, 25, 29, 41, 22, 9]])
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def untrusted(monkeypatch):
    """Requests go to the process without weights that strangers get."""
    plain = RequestModel.metadata
    monkeypatch.setattr(RequestModel, "metadata", lambda self: plain(self)[:-1] + ',"trusted":false}')


@pytest.fixture(scope="module")
def local():
    """Cases on local weights, each fitted once."""
    cases = {}

    def case(method):
        if method not in cases:
            cases[method] = Case(method, "nnsight")
        return cases[method]

    return case


def clean(model):
    return not model.dispatched and not model._edits and not {"generate", "_remote_backend"} & set(vars(model))


@pytest.mark.parametrize("method", discover_methods())
def test_every_method_steers_as_it_does_here(method, client, local):
    if "check_runs_on_a_server" in exceptions(method):
        with pytest.raises(Exception, match=exceptions(method)["check_runs_on_a_server"]):
            check_runs_on_a_server(local(method), Case(method, "nnsight", model=client, remote=True))
        return
    check_runs_on_a_server(local(method), Case(method, "nnsight", model=client, remote=True))
    assert clean(client), "the weights were loaded here, or something was left behind"


def test_a_sum_of_two(client, local):
    case = local("lqr")
    both = Case("lqr", "nnsight", model=case.model)
    both.controller = case.controller + local("caa").controller
    check_runs_on_a_server(both, Case("lqr", "nnsight", model=client, remote=True))


@pytest.mark.parametrize("method", ["lqr", "caa", "ablation"])
def test_untrusted_requests(method, client, local, untrusted):
    check_runs_on_a_server(local(method), Case(method, "nnsight", model=client, remote=True))


def test_a_bfloat16_server(client, model_dir, local, monkeypatch):
    with ndif_server(model_dir, dtype="bfloat16") as server:
        monkeypatch.setattr(nnsight.CONFIG.API, "HOST", server.url)
        for method in ("lqr", "caa"):
            check_runs_on_a_server(local(method), Case(method, "nnsight", model=client, remote=True), exact=False)


def test_the_forms_of_a_call(client, local):
    case = local("lqr")
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with case.steer() as run:
        tokens, expected = case.generate(IDS, 5), run.record.copy()
        logits, one_pass = case.logits(IDS), run.record.copy()
    with sl.steer(client, case.controller) as run:
        assert torch.equal(client.generate(IDS, **options, remote=True), tokens)
        assert same(run.record, expected)
        with client.generate(IDS, **options, remote=True) as tracer:
            inside = tracer.result.save()
        assert torch.equal(inside, tokens)
        assert same(run.record, expected)
        with client.trace(IDS, remote=True):
            remote_logits = client.output.logits.save()
        assert torch.equal(remote_logits, logits)
        assert same(run.record, one_pass)
        with client.session(remote=True):
            with client.trace(IDS):
                in_session = client.output.logits.save()
        assert torch.equal(in_session, logits)
        assert same(run.record, one_pass)
        assert 0 < run.payload_bytes < 100_000
        with client.trace(remote=True) as tracer:
            with tracer.invoke(IDS):
                first = client.output.logits.save()
            with tracer.invoke(IDS.flip(1)):
                second = client.output.logits.save()
        torch.testing.assert_close(first, logits, rtol=1e-4, atol=1e-5)
        assert first.shape == second.shape
    assert clean(client)


def same(record, expected):
    return set(record) == set(expected) and all(
        torch.equal(record[name].nan_to_num(), value.nan_to_num()) for name, value in expected.items()
    )


def test_contrast_vectors_are_read_on_the_server(client, local):
    case = local("caa")
    fitted = sl.caa(sl.remote(client), case.data)
    assert torch.equal(fitted.loops[0].law.vector, case.controller.loops[0].law.vector)
    assert clean(client)
    with pytest.raises(NotImplementedError, match="needs the weights here"):
        sl.caa(client, case.data)
    with pytest.raises(NotImplementedError, match="linearising the blocks needs the weights here"):
        sl.lqr(sl.remote(client), case.data, progress=False)


class Failing(sl.Law):
    def act(self, x, memory):
        if x.any():
            raise ArithmeticError("the law fails on purpose")
        return torch.zeros_like(x), {}


def test_failures_are_told_and_leave_nothing(client, local, monkeypatch):
    case, plain = local("caa"), None
    with client.trace(IDS, remote=True):
        plain = client.output.logits.save()
    nnsight.register(sys.modules[__name__])

    with pytest.raises(RemoteError, match="the server raised ArithmeticError: the law fails on purpose"):
        with sl.steer(client, sl.Controller([sl.Loop(Failing(), sl.Site(1))])):
            client.generate(IDS, max_new_tokens=2, remote=True)
    assert clean(client)

    host = nnsight.CONFIG.API.HOST
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"the NDIF server at http://127.0.0.1:9 cannot be reached"):
        with sl.steer(client, case.controller):
            client.generate(IDS, max_new_tokens=2, remote=True)
    assert clean(client)
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", host)

    with pytest.raises(ValueError, match=r"the request has .* MB, the limit is 0\.0 MB"):
        with sl.steer(client, case.controller, payload_limit=1000):
            client.generate(IDS, max_new_tokens=2, remote=True)
    with pytest.raises(NotImplementedError, match="blocking=False leaves before the record is there"):
        with sl.steer(client, case.controller):
            with client.trace(IDS, remote=True, blocking=False):
                client.output.logits.save()
    assert clean(client)

    with client.trace(IDS, remote=True):
        after = client.output.logits.save()
    assert torch.equal(after, plain), "the next call does not work as before"


def test_a_model_that_the_server_cannot_load(client, local, monkeypatch):
    monkeypatch.setattr(client, "to_model_key", lambda: type(client).to_model_key(client).replace("model", "nowhere"))
    with pytest.raises(RemoteError, match="the server"), sl.steer(client, local("caa").controller):
        client.generate(IDS, max_new_tokens=2, remote=True)
    assert clean(client)


def test_nested_runs(client, local):
    case = local("ablation")
    with sl.steer(case.model, case.controller), sl.steer(case.model, case.controller * 0.5) as run:
        tokens, expected = case.generate(IDS, 4), run.record.copy()
    with sl.steer(client, case.controller), sl.steer(client, case.controller * 0.5) as run:
        assert torch.equal(Case("ablation", "nnsight", model=client, remote=True).generate(IDS, 4), tokens)
        assert same(run.record, expected)
    assert clean(client)


def test_no_key_shows(client, local, monkeypatch):
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", "secret-key-123")
    with sl.steer(client, local("caa").controller) as run:
        client.generate(IDS, max_new_tokens=2, remote=True)
        shown = repr(run) + repr(run.record) + repr(run.controller) + str(run.controller.recipe)
        monkeypatch.setattr(nnsight.CONFIG.API, "HOST", "http://127.0.0.1:9")
        with pytest.raises(ConnectionError) as caught:
            client.generate(IDS, max_new_tokens=2, remote=True)
    assert "secret-key-123" not in shown + str(caught.value)


def test_the_tutorial(server):
    """Executes the remote notebook against this server, with SmolLM2."""
    model, _ = smollm2(host="hf")
    path = model.config._name_or_path
    setup = f"import nnsight.modeling.huggingface as hub; hub._ID_CACHE[{path!r}] = {path!r}"
    command = [sys.executable, str(ROOT / "tutorials" / "build.py"), "07_remote", "--check", "--setup", setup]
    environment = {**os.environ, "NDIF_HOST": server, "STEERLENS_REMOTE_MODEL": path, "PYTHONPATH": str(ROOT)}
    if os.environ.get("STEERLENS_WRITE_NOTEBOOKS"):
        command.remove("--check")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
