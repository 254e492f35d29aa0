"""What a user looks for: names, controllers of one vector, arithmetic and iteration, the record's forms, reprs."""

from __future__ import annotations

import pytest
import torch

import steerlens as sl
from steerlens.models import tiny
from steerlens.testing import Case

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
    assert {"feature", "hold", "observe", "rank_features", "describe"} <= set(sl.sae.__all__)


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


@pytest.fixture(scope="module")
def record(model):
    controller = sl.Controller([sl.Loop(sl.Feedback(level(), level().basis), sl.Site(layer)) for layer in (1, 3)])
    with sl.steer(model, controller, record="all") as run:
        model(PROMPT.repeat(2, 1))
    return run.record.copy()


def level():
    return sl.Level(torch.nn.functional.normalize(torch.linspace(-1, 1, 32), dim=0), 2.0)


def test_a_record_knows_short_names(record):
    full = record["blocks.3.hook_steer_error"]
    for name in (("error", 3), ("steer_error", 3), ("hook_steer_error", 3)):
        assert record[name] is full or torch.equal(record[name], full, equal_nan=True)
        assert name in record
    assert ("error", 2) not in record
    assert "error" not in record
    with pytest.raises(KeyError, match=r"no signal \('eror', 3\) .* holds .*error at layers 1, 3"):
        record["eror", 3]
    with pytest.raises(KeyError, match=r"no signal 'blocks.9.hook_steer_u' was recorded"):
        record["blocks.9.hook_steer_u"]
    assert record.get("nothing") is None


def test_a_record_is_a_long_table(record):
    pytest.importorskip("pandas")
    table = record.frame()
    assert list(table.columns) == ["row", "token", "layer", "signal", "value"]
    assert set(table.signal) == {"error", "projection", "u_norm"}
    assert len(table) == 2 * 4 * 2 * 3
    for layer in (1, 3):
        for row in (0, 1):
            chosen = table[(table.layer == layer) & (table.row == row) & (table.signal == "error")].sort_values("token")
            expected = record["error", layer][row].double()
            torch.testing.assert_close(torch.tensor(chosen.value.tolist()).double(), expected, equal_nan=True)


def test_a_record_is_a_cache_and_a_picture(record, model):
    from transformer_lens import ActivationCache

    for cache in (record.to_cache(), record.to_cache(model)):
        assert isinstance(cache, ActivationCache)
        torch.testing.assert_close(cache["steer_error", 3], record["error", 3], equal_nan=True)
    figure = record.plot(tokens=["a", "b", "c", "d"])
    assert len(figure.data) == 2
    assert list(figure.data[0].y) == [1, 3]


def test_reprs_say_what_a_thing_is(record, model):
    controller = sl.add(torch.ones(32), layer=1)
    assert repr(record) == (
        "Record(8 signals of 2 rows, 4 tokens: u at layers 1, 3; u_norm at layers 1, 3; "
        "error at layers 1, 3; projection at layers 1, 3)"
    )
    with sl.steer(model, controller) as run:
        model(torch.tensor([[3, 17]]))
    assert repr(run.record) == "Record(1 signal of 1 row, 2 tokens: u_norm at layer 1)"
    assert repr(type(record)()) == "Record(it is empty)"
    assert repr(controller) == "Controller(add: 1 loop at layer 1, 128 B)"
    assert repr(sl.Controller(controller.loops)) == "Controller(1 loop at layer 1, 128 B)"
    assert repr(sl.Pairs(["a"], ["b", "c"])) == "Pairs(1 positive, 2 negative, read='last')"
    assert repr(sl.Add(torch.ones(32))) == "Add(vector=[32])"
    assert repr(sl.Feedback(level(), torch.ones(1, 32))) == (
        "Feedback(setpoint=Level(basis=[1 32], level=[1]), gains=[1 32], matrix=None)"
    )
    assert repr(sl.Site(3)) == "Site(3, 'resid_post')"
    gate = sl.Gate(sl.Side(torch.ones(32), torch.tensor(1.5)), [sl.Summary(sl.Site(2))])
    assert repr(gate) == (
        "Gate(condition=Side(direction=[32], threshold=1.5), "
        "summaries=(Summary(place='blocks.2.hook_resid_post', pool='mean', where='prompt'),), "
        "inverted=False, each_token=False)"
    )
    assert repr(sl.Loop(sl.Add(torch.ones(32)), 2)) == (
        "Loop(Add(vector=[32]), Site(2, 'resid_post'), where='last', strength=1.0)"
    )
    with sl.steer(model, controller) as run:
        assert repr(run) == f"Run({controller!r} on TransformerBridge, attached; {run.record!r})"
    assert "removed" in repr(run)


@pytest.mark.parametrize("method", ["caa", "lqr", "sadi", "ablation", "pid"])
@pytest.mark.parametrize("where", ["last", "all"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_controller_as_hooks_steers_one_pass_as_steer_does(method, where, family):
    # without a second pass, which hooks cannot run
    options = {"paper": True} if method in ("lqr", "pid") else {}
    case = Case(method, "bridge", family=family, options=options)
    model, controller = case.model, case.controller.at(where)
    tokens = torch.tensor([case.prompt, case.prompt[::-1]])
    with sl.steer(model, controller):
        expected = model(tokens)
    if "resid_mid" in {site.point for site in controller.sites}:
        with pytest.raises(ValueError, match="ignores what a hook writes"):
            controller.fwd_hooks()
        controller = sl.Controller(loop for loop in controller if loop.act.point != "resid_mid")
        with sl.steer(model, controller):
            expected = model(tokens)
    hooks = controller.fwd_hooks()
    for _ in range(2):  # the same functions serve any number of passes
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=hooks), expected)
    assert not torch.equal(model(tokens), expected)


def test_hooks_refuse_what_needs_another_pass():
    case = Case("tda", "bridge")
    with pytest.raises(ValueError, match="needs a second pass over the text"):
        case.controller.fwd_hooks()
