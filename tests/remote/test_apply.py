"""apply() inside blocks that run on a real NDIF server."""

from __future__ import annotations

import pytest
import torch
from nnsight.intervention.backends.remote import RemoteError

import steerlens
import steerlens as sl
from remote.expect import IDS, OPTIONS, clean, same
from steerlens import apply

pytestmark = pytest.mark.remote


@pytest.mark.parametrize("trust", ["trusted", "untrusted"])
def test_every_form_of_a_block(trust, client, local, request):
    if trust == "untrusted":
        request.getfixturevalue("untrusted")
    case = local("lqr")
    controller, other = case.controller, local("caa").controller
    with case.steer() as run:
        tokens, expected = case.generate(IDS, 5), run.record.copy()
        logits, one_pass = case.logits(IDS), run.record.copy()
        with case.model.trace(IDS):
            state = case.model.model.layers[1].output.save()

    with client.generate(IDS, **OPTIONS, remote=True) as tracer:
        run = sl.apply(client, controller)
        found = tracer.result.save()
    assert torch.equal(found, tokens)
    assert same(run.record, expected)

    with client.trace(IDS, remote=True):
        run = apply(client, controller)
        inside = client.model.layers[1].output.save()
        steered = client.output.logits.save()
    assert torch.equal(inside, state)
    assert torch.equal(steered, logits)
    assert same(run.record, one_pass)

    with client.session(remote=True):
        with client.trace(IDS):
            run = steerlens.apply(client, controller)
            steered = client.output.logits.save()
    assert torch.equal(steered, logits)
    assert same(run.record, one_pass)

    with client.trace(remote=True) as tracer:
        with tracer.invoke(IDS):
            run = apply(client, controller)
            first = client.output.logits.save()
        with tracer.invoke(IDS):
            apply(client, other)
            second = client.output.logits.save()
    torch.testing.assert_close(first, logits, rtol=1e-4, atol=1e-5)
    assert (first - second).abs().max() > 1e-3
    assert set(run.record) == set(one_pass)
    assert clean(client)


def test_under_steer_and_as_a_cache(client, local):
    case, other = local("ablation"), local("caa").controller
    with sl.steer(case.model, case.controller) as outer, sl.steer(case.model, other) as inner:
        logits = case.logits(IDS)
    with sl.steer(client, case.controller) as run:
        with client.trace(IDS, remote=True):
            applied = sl.apply(client, other)
            found = client.output.logits.save()
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)
    assert same(run.record, outer.record, rounding=1e-5)
    assert same(applied.record, inner.record, rounding=1e-5)
    pytest.importorskip("transformer_lens")
    assert same(dict(applied.to_cache().items()), dict(inner.to_cache().items()), rounding=1e-5)


def test_what_a_server_cannot_do_is_told_in_its_last_line(client, local):
    controller = local("caa").controller
    with pytest.raises(RemoteError, match=r"\nRuntimeError: apply\(\) came after the forward pass had begun.*\n?$"):
        with client.trace(IDS, remote=True):
            client.model.layers[0].output.save()
            sl.apply(client, controller)
    with pytest.raises(RemoteError, match=r"\nAttributeError: a server has no steerlens\.Controller: .*\n?$"):
        with client.trace(IDS, remote=True):
            sl.apply(client, controller + sl.Controller([]))
    elsewhere = sl.Controller(controller.loops, {"method": "caa", "model": {"n_layers": 7}})
    with pytest.raises(RemoteError, match="this caa was fitted on another model: n_layers is 4, it was 7"):
        with client.trace(IDS, remote=True):
            sl.apply(client, elsewhere)
    assert clean(client)
