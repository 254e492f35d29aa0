"""What a user looks for: names, controllers of one vector, arithmetic and iteration, the record's forms, reprs."""

from __future__ import annotations

import pytest
import torch

import steerlens as sl
from steerlens.models import tiny

PROMPT = torch.tensor([[3, 17, 25, 29]])


@pytest.fixture(scope="module")
def model():
    return tiny("llama", host="bridge")


def final(model, site, controller=None):
    """The state at a site, by a hook of TransformerLens."""
    found = []
    hooks = [(str(site), lambda x, hook: found.append(x.detach().clone()))]
    if controller is None:
        model.run_with_hooks(PROMPT, fwd_hooks=hooks)
    else:
        with sl.steer(model, controller):
            model.run_with_hooks(PROMPT, fwd_hooks=hooks)
    return found[0]


def test_the_public_names_are_those_that_dir_lists():
    assert dir(sl) == sorted(sl.__all__)
    assert all(hasattr(sl, name) for name in sl.__all__)
    assert not {"core", "torch", "sys", "Package", "lead", "watch", "feature"} & set(dir(sl))
    assert {"feature", "hold", "reach", "observe", "rank_features", "describe"} <= set(sl.sae.__all__)


def test_add_adds_a_vector(model):
    vector = torch.linspace(-1, 1, 32)
    site = sl.Site(2)
    change = final(model, site, sl.add(vector, layer=2, where="all", strength=0.5)) - final(model, site)
    torch.testing.assert_close(change[0, 1:], (0.5 * vector).expand(3, -1), atol=1e-5, rtol=0)
    assert float(change[0, 0].abs().max()) == 0  # the names of positions leave position 0 alone
    several = sl.add(vector.tolist(), layer=[0, 2], point="attn_out")
    assert [str(site) for site in several.sites] == ["blocks.0.hook_attn_out", "blocks.2.hook_attn_out"]
    heads = sl.add(torch.ones(4, 8), layer=1, point="z")
    assert float((final(model, sl.Site(1, "z"), heads) - final(model, sl.Site(1, "z"))).abs().max()) > 0.9


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: sl.add("vector", layer=1), TypeError, "vector is a str; give a tensor"),
        (lambda: sl.add([["a"]], layer=1), TypeError, "holds no numbers"),
        (lambda: sl.add(torch.ones(2, 32), layer=1), ValueError, r"vector has shape \[2, 32\]; give \[d\]"),
        (lambda: sl.add(torch.full((32,), torch.nan), layer=1), ValueError, "vector is not finite"),
        (lambda: sl.add(torch.ones(32), layer=[]), ValueError, "layer is empty"),
        (lambda: sl.add(torch.ones(32), layer=[1, 1]), ValueError, "names a layer twice"),
        (lambda: sl.project_out(torch.zeros(32), layer=1), ValueError, "direction is zero"),
        (lambda: sl.project_out(torch.ones(2, 32), layer=1), ValueError, "linearly dependent"),
        (lambda: sl.project_out(torch.ones(32), layer=1, point="z"), ValueError, "use 'attn_out'"),
        (lambda: sl.observe(torch.ones(32), 1), TypeError, r"takes a setpoint, it got a Tensor"),
    ],
)
def test_what_they_refuse(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


def test_project_out_removes_a_span(model):
    rows = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)) * 100
    left = final(model, sl.Site(1), sl.project_out(rows, layer=1, where=slice(0, None)))
    assert float((left @ torch.nn.functional.normalize(rows, dim=-1).T).abs().max()) < 1e-5
    before = final(model, sl.Site(1))
    # what is orthogonal to the rows stays: least squares of the difference on the rows leaves nothing
    change = (before - left)[0]
    explained = torch.linalg.lstsq(rows.T, change.T).solution
    torch.testing.assert_close((rows.T @ explained).T, change, atol=1e-5, rtol=0)


def test_observe_measures_and_does_nothing(model):
    direction = torch.nn.functional.normalize(torch.linspace(-1, 1, 32), dim=0)
    watched = sl.observe(sl.Level(direction, 2.0), "blocks.1.hook_resid_post")
    plain = model(PROMPT)
    with sl.steer(model, watched) as run:
        assert torch.equal(model(PROMPT), plain)
    expected = final(model, sl.Site(1)) @ direction
    torch.testing.assert_close(run.record["projection", 1][:, 1:], expected[:, 1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(run.record["error", 1][:, 1:], (2 - expected[:, 1:]).abs(), atol=1e-5, rtol=0)


def test_controllers_are_subtracted_and_iterated_over(model):
    a, b = sl.add(torch.ones(32), layer=1), sl.add(torch.linspace(0, 1, 32), layer=[1, 2])
    assert len(b) == 2
    assert [loop.act.layer for loop in b] == [1, 2]
    assert list(a - b)[1:] != list(b)
    difference = final(model, sl.Site(1), a - b) - final(model, sl.Site(1))
    expected = torch.ones(32) - torch.linspace(0, 1, 32)
    torch.testing.assert_close(difference[0, -1], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(final(model, sl.Site(1), -a), final(model, sl.Site(1), a * -1.0))
    assert torch.equal(final(model, sl.Site(1), a - a)[0, :1], final(model, sl.Site(1))[0, :1])
    with pytest.raises(TypeError):
        a - 1
