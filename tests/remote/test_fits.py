"""Fits whose forward and backward passes run on a real NDIF server."""

from __future__ import annotations

import pytest
import torch
from nnsight.intervention.backends.remote import RemoteError

import steerlens as sl
from remote.expect import clean
from steerlens.core import POINTS, tensors_of
from steerlens.hosts import host_of

pytestmark = pytest.mark.remote


def test_contrast_vectors_are_read_on_the_server(client, local):
    case = local("caa")
    fitted = sl.caa(sl.remote(client), case.data)
    assert torch.equal(fitted.loops[0].law.vector, case.controller.loops[0].law.vector)
    assert clean(client)
    with pytest.raises(NotImplementedError, match="needs the weights here"):
        sl.caa(client, case.data)
    with pytest.raises(NotImplementedError, match="needs the weights here"):
        sl.lqr(client, case.data, progress=False)


def test_gradients_are_those_of_local_weights_and_come_back_pooled(client, local):
    texts, weights = [[3, 17, 25, 29, 41, 22, 9], [7, 30, 31, 32]], [[0, 0, 1, 0, 0, 0, 0], [0, 0.5, 0.5, 0]]
    sites = [sl.Site(layer, point) for layer in (0, 2) for point in POINTS]

    def loss(logits):
        return logits[0, -1].square().mean() + logits[1, :4].logsumexp(-1).sum()

    expected = host_of(local("caa").model).gradients(texts, weights, sites, loss)
    found = sl.remote(client).gradients(texts, weights, sites, loss)
    for site in sites:
        assert found[site].shape == expected[site].shape == (2, *host_of(client).shape(site))
        torch.testing.assert_close(found[site], expected[site], rtol=1e-5, atol=1e-7)
    assert clean(client)


@pytest.mark.parametrize("loss", ["dpo", "sft", "negative_sft", "own"])
def test_cold_kernel_is_fitted_on_the_server(loss, client, local):
    case = local("cold_kernel")

    def margin(chosen, rejected):
        return (rejected - chosen).relu() + chosen.square()

    options = {"loss": margin if loss == "own" else loss, "kernel": "linear"}
    expected, fitted = (sl.cold_kernel(model, case.data, **options) for model in (case.model, sl.remote(client)))
    for mine, theirs in zip(fitted.loops, expected.loops, strict=True):
        assert mine.strength == pytest.approx(theirs.strength, rel=1e-5)
        for a, b in zip(tensors_of(mine.law), tensors_of(theirs.law), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert clean(client)


def test_a_server_that_does_not_trust_takes_no_gradients(client, local, untrusted):
    words = r"^the server raised NotImplementedError: .*untrusted.* fit on local weights"
    with pytest.raises(RemoteError, match=words):
        sl.cold_kernel(sl.remote(client), local("cold_kernel").data)
    fitted = sl.caa(sl.remote(client), local("caa").data)
    assert torch.equal(fitted.loops[0].law.vector, local("caa").controller.loops[0].law.vector)
    with pytest.raises(NotImplementedError, match="use a server that trusts you"):
        sl.cold_kernel(client, local("cold_kernel").data)


LQR = [{"solver": "dense"}, {"solver": "output"}, {"solver": "output", "preview": True}, {"solver": "scalar"}]


def assert_same_laws(fitted, expected):
    assert fitted.layers == expected.layers
    for mine, theirs in zip(fitted.loops, expected.loops, strict=True):
        for a, b in zip(tensors_of(mine.law), tensors_of(theirs.law), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", LQR, ids=lambda options: "-".join(map(str, options.values())))
def test_lqr_is_linearised_and_solved_beside_the_weights(options, client, local):
    case = local("lqr")
    expected, fitted = (sl.lqr(model, case.data, **options) for model in (case.model, sl.remote(client)))
    assert_same_laws(fitted, expected)
    assert clean(client)


@pytest.mark.parametrize("method", ["pid", "track"])
def test_what_else_follows_a_setpoint_is_fitted_on_the_server(method, client, local):
    case = local(method)
    options = {"solver": "output"} if method == "track" else {}
    assert_same_laws(*(getattr(sl, method)(model, case.data, **options) for model in (sl.remote(client), case.model)))


def test_a_server_that_does_not_trust_gives_tangents_by_differences(client, local, untrusted):
    case = local("lqr")
    expected = sl.lqr(case.model, case.data, solver="scalar", paper=True, progress=False)
    fitted = sl.lqr(sl.remote(client), case.data, solver="scalar", paper=True, progress=False)
    assert fitted.layers == expected.layers
    for mine, theirs in zip(fitted.loops, expected.loops, strict=True):
        error = (mine.law.gains - theirs.law.gains).norm() / theirs.law.gains.norm()
        # of order step^2 + rounding / step, see steerlens.hosts.traced.differences
        assert error < 1e-3
    with pytest.raises(NotImplementedError, match=r"apart from the weights .*solver='scalar'"):
        sl.lqr(sl.remote(client), case.data, paper=True, progress=False)
    assert clean(client)


def test_gains_as_matrices_do_not_cross_the_wire(client, local):
    with pytest.raises(ValueError, match="do not come back from a server"):
        sl.lqr(sl.remote(client), local("lqr").data, full_gain=True, paper=True, progress=False)
