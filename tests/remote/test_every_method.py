"""Every method's fit on a real NDIF server, in both trust modes: equal to the local one, or refused in a sentence."""

from __future__ import annotations

import pytest
import torch
from nnsight.intervention.backends.remote import RemoteError

import steerlens as sl
from remote.expect import clean
from steerlens.core import tensors_of
from steerlens.testing import discover_methods

pytestmark = pytest.mark.remote

#: Options with which a method is fitted on a server.
OPTIONS = {"track": {"solver": "output"}, "lqr": {"paper": True}, "pid": {"paper": True}}
PARAMETERS = "differentiating the parameters needs the weights here"
TRAINING = "training a vector needs the weights here"
WEIGHTS = "output weights of the MLP are not here"
APART = r"apart from the weights \(untrusted\)"
#: Method -> the words of the refusal on a server that trusts, and on one that does not; docs/remote.md has the table.
REFUSED = {
    "cold_fd": (PARAMETERS, PARAMETERS),
    "tda": (WEIGHTS, WEIGHTS),
    "cold_kernel": (None, APART),
    "lqr": (None, APART),
    "track": (None, APART),
    "trained_vector": (TRAINING, TRAINING),
}
#: Gains from a server are solved in another process, everything else is the same operations on the same numbers.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize("trusted", [True, False], ids=["trusted", "untrusted"])
@pytest.mark.parametrize("method", sorted(discover_methods()))
def test_a_fit_on_the_server_is_the_local_one_or_refused(method, trusted, client, local, request):
    case = local(method)
    options = OPTIONS.get(method, {})
    if not trusted:
        request.getfixturevalue("untrusted")
    words = REFUSED.get(method, (None, None))[not trusted]
    fit = discover_methods()[method]
    if words is not None:
        with pytest.raises((NotImplementedError, RemoteError), match=words) as refusal:
            fit(sl.remote(client), case.data, **options)
        assert len(str(refusal.value).splitlines()[0]) < 300
        assert clean(client)
        return
    expected, fitted = case.fit(**options), fit(sl.remote(client), case.data, **options)
    assert [loop.act for loop in fitted.loops] == [loop.act for loop in expected.loops]
    for mine, theirs in zip(fitted.loops, expected.loops, strict=True):
        assert mine.strength == pytest.approx(theirs.strength, rel=1e-5)
        for a, b in zip(tensors_of(mine.law), tensors_of(theirs.law), strict=True):
            torch.testing.assert_close(a, b, **TOLERANCE)
    assert clean(client)


def test_differences_on_a_server_show_a_bar_over_the_texts(client, local, untrusted, capsys, monkeypatch):
    monkeypatch.setattr("steerlens.core.progress.DELAY_S", 0)
    sl.lqr(sl.remote(client), local("lqr").data, solver="scalar", linearize_on=2, progress=True)
    assert "differences on the server" in capsys.readouterr().err
    sl.lqr(sl.remote(client), local("lqr").data, solver="scalar", linearize_on=1, progress=False)
    assert "differences on the server" not in capsys.readouterr().err
