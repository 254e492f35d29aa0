"""Steering on a real NDIF server: every method, the forms of a call, and the tutorial."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nnsight
import pytest
import torch
from nnsight.intervention.backends.remote import RemoteError

import steerlens as sl
from remote.expect import IDS, OPTIONS, clean, same
from remote.server import ndif_server
from steerlens.models import smollm2
from steerlens.testing import Case, check_runs_on_a_server, discover_methods, exceptions

pytestmark = pytest.mark.remote
ROOT = Path(__file__).resolve().parents[2]


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


@pytest.mark.parametrize("kind", ["trusted", "untrusted"])
def test_parts_of_the_text_and_gates_for_each_token(kind, client, local, request):
    """A span is found in ids that no tokenizer reads there; a gate decides about each token beside the weights."""
    if kind == "untrusted":
        request.getfixturevalue("untrusted")
    case = local("caa")
    prompt = case.prompt
    with case.steer():
        written = case.generate(torch.tensor([prompt]))[0].tolist()
    first, later = (case.model.tokenizer.decode(written[at : at + 2]) for at in (2, len(prompt) + 1))
    prompts = sl.Pairs([[3, 17, 25, 29, 41], [7, 17, 26, 30, 42]], [[50, 60, 70, 80, 90], [51, 61, 71, 81, 91]])
    ramp = sl.gate(case.model, prompts, gate_layers=0, curve="linear")
    for controller in (
        case.controller.at(sl.between(case.model, first, later)),
        case.controller.at(sl.until(case.model, first)),
        sl.when(case.controller, ramp, each_token=True),
    ):
        with sl.steer(case.model, controller, record="all") as run:
            case.generate(torch.tensor([prompt]))
        (u,) = (value for name, value in run.record.items() if name.endswith("steer_u_norm"))
        assert len(u.nan_to_num().unique()) > 1, "the case selects nothing, or all alike"
        held = Case("caa", "nnsight", model=case.model)
        held.controller = controller
        check_runs_on_a_server(held, Case("caa", "nnsight", model=client, remote=True))
    assert clean(client)


def test_what_needs_a_second_pass(client, local):
    """A gate behind the steered layer, frozen states, references, and tangents while decoding: the server runs it."""
    case = local("caa")
    prompts = sl.Pairs([[3, 17, 25, 29, 41], [7, 17, 26, 30, 42]], [[50, 60, 70, 80, 90], [51, 61, 71, 81, 91]])
    behind = sl.when(case.fit(layers=1, where="all", strength=3.0), sl.gate(case.model, prompts, gate_layers=2))
    early = sl.schedule(behind, [1.0, 0.5], prompt=0.5)
    for method, controller in (
        ("caa", early),
        ("sadi", local("sadi").fit(mode="frozen", component="neuron")),
        ("cold_fd", local("cold_fd").fit(where="all", layers=[0, 2])),
        ("lqr", local("lqr").fit(origin="own", level=1.5)),
    ):
        held = Case(method, "nnsight", model=case.model)
        held.controller = controller
        check_runs_on_a_server(held, Case(method, "nnsight", model=client, remote=True))
    assert clean(client)


def test_an_untrusted_request_cannot_have_a_second_pass(client, local, untrusted):
    case = local("caa")
    prompts = sl.Pairs([[3, 17, 25, 29, 41]], [[50, 60, 70, 80, 90]])
    before = sl.when(case.fit(layers=1, where="all"), sl.gate(case.model, prompts, gate_layers=0))
    held = Case("caa", "nnsight", model=case.model)
    held.controller = before
    check_runs_on_a_server(held, Case("caa", "nnsight", model=client, remote=True))
    behind = sl.when(case.fit(layers=1, where="all"), sl.gate(case.model, prompts, gate_layers=2))
    with pytest.raises(RemoteError, match="a loop needs a second forward pass in addition to the steered one"):
        with sl.steer(client, behind):
            client.generate(IDS, max_new_tokens=2, remote=True)
    assert clean(client)


def test_a_bfloat16_server(client, model_dir, local, monkeypatch):
    with ndif_server(model_dir, dtype="bfloat16") as server:
        monkeypatch.setattr(nnsight.CONFIG.API, "HOST", server.url)
        for method in ("lqr", "caa"):
            check_runs_on_a_server(local(method), Case(method, "nnsight", model=client, remote=True), exact=False)


def test_the_forms_of_a_call(client, local):
    case = local("lqr")
    with case.steer() as run:
        tokens, expected = case.generate(IDS, 5), run.record.copy()
        logits, one_pass = case.logits(IDS), run.record.copy()
    with sl.steer(client, case.controller) as run:
        assert torch.equal(client.generate(IDS, **OPTIONS, remote=True), tokens)
        assert same(run.record, expected)
        with client.generate(IDS, **OPTIONS, remote=True) as tracer:
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


def test_a_call_on_the_line_of_the_with(client, local):
    case = local("caa")
    with case.steer():
        tokens = case.generate(IDS, 5)
    # fmt: off
    with sl.steer(client, case.controller): found = client.generate(IDS, **OPTIONS, remote=True)  # noqa: E701
    # fmt: on
    assert torch.equal(found, tokens)
    assert clean(client)


def test_a_remote_record_becomes_a_cache(client, local):
    pytest.importorskip("transformer_lens")
    case = local("lqr")
    with case.steer(record="all") as run:
        case.generate(IDS, 5)
        expected = run.to_cache()
    with sl.steer(client, case.controller, record="all") as run:
        client.generate(IDS, **OPTIONS, remote=True)
        cache = run.to_cache()
    assert same(dict(cache.items()), dict(expected.items()))
    assert cache["steer_error", 1].shape == (1, IDS.shape[1] + 4)
    assert torch.equal(cache.stack_activation("steer_u_norm"), run.record.stack("u_norm"))


def test_nested_runs(client, local):
    case = local("ablation")
    with sl.steer(case.model, case.controller * 0.5), sl.steer(case.model, case.controller * 0.25) as run:
        tokens, expected = case.generate(IDS, 4), run.record.copy()
    with sl.steer(client, case.controller * 0.5), sl.steer(client, case.controller * 0.25) as run:
        assert torch.equal(Case("ablation", "nnsight", model=client, remote=True).generate(IDS, 4), tokens)
        assert same(run.record, expected, rounding=1e-5)
    assert clean(client)


def test_the_tutorial(server):
    """Executes the remote notebook against this server, with SmolLM2."""
    path = smollm2(host="nnsight").repo_id
    # the folder is the model's name, and no hub is asked about it
    setup = f"import nnsight.modeling.huggingface as hub; hub._ID_CACHE[{path!r}] = {path!r}"
    setup += "; import nnsight; nnsight.CONFIG.APP.REMOTE_LOGGING = False"
    command = [sys.executable, str(ROOT / "tutorials" / "build.py"), "07_nnsight_and_ndif", "--check", "--setup", setup]
    environment = {**os.environ, "NDIF_HOST": server, "NDIF_API_KEY": "of the test server", "PYTHONPATH": str(ROOT)}
    if os.environ.get("STEERLENS_WRITE_NOTEBOOKS"):
        command.remove("--check")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
