"""apply() in a traced block steers as `with steer(...)` does around it."""

from __future__ import annotations

import importlib
import pickle

import pytest
import torch

pytest.importorskip("nnsight")

import steerlens as sl
from steerlens.core import POINTS
from steerlens.testing import Case, discover_hosts, discover_methods, snapshot

IDS = torch.tensor([[3, 17, 25, 29, 41, 22, 9]])
PAIR = torch.tensor([[3, 17, 25, 29, 41], [7, 30, 31, 32, 33]])
FAMILIES = ["llama", "gemma", "gpt2"]


def same(record, expected):
    return set(record) == set(expected) and all(
        torch.equal(record[name].nan_to_num(), value.nan_to_num()) for name, value in expected.items()
    )


def everywhere(case, size=1.0):
    """Loops at every point of two blocks: each of the ways in which an edit writes."""
    host = sl.hosts.host_of(case.model)
    loops = []
    for layer in (1, 2):
        for point in POINTS:
            shape = host.shape(sl.Site(layer, point))
            vector = torch.linspace(-size, size, steps=torch.Size(shape).numel()).reshape(shape)
            loops.append(sl.Loop(sl.Add(vector), sl.Site(layer, point), where="all"))
    return sl.Controller(loops)


@pytest.mark.parametrize("method", discover_methods())
def test_every_method_steers_a_generation_as_in_steer(method):
    case = Case(method, "nnsight")
    controller, model = case.controller, case.model
    for cache in (True, False):
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "use_cache": cache}
        with case.steer(record="all") as run:
            tokens, expected = case.generate(IDS, 4, cache=cache), run.record.copy()
        before = snapshot(model)
        with model.generate(IDS, **options) as tracer:
            applied = sl.apply(model, controller, record="all")
            found = tracer.result.save()
        assert torch.equal(found, tokens)
        assert same(applied.record, expected)
        assert snapshot(model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_every_point_is_written_and_every_layer_read_in_the_same_block(family):
    case = Case("caa", "nnsight", family=family)
    model, controller = case.model, everywhere(case)
    layers = sl.hosts.host_of(model).layers
    with sl.steer(model, controller) as run, model.trace(IDS):
        expected = [layer.output for layer in layers]
        logits = model.output.logits.save()
        states = torch.stack([value if isinstance(value, torch.Tensor) else value[0] for value in expected]).save()
    with model.trace(IDS):
        applied = sl.apply(model, controller)
        found = [layer.output for layer in layers]
        steered = model.output.logits.save()
        inside = torch.stack([value if isinstance(value, torch.Tensor) else value[0] for value in found]).save()
    assert torch.equal(inside, states)
    assert torch.equal(steered, logits)
    assert same(applied.record, run.record)


def test_options_are_those_of_steer():
    case = Case("lqr", "nnsight", options={"paper": True})
    controller, model = case.controller, case.model
    with case.steer(where="all", strength=0.5, record=("u",)) as run:
        logits = case.logits(IDS)
    with model.trace(IDS):
        applied = sl.apply(model, controller, where="all", strength=0.5, record=("u",))
        found = model.output.logits.save()
    assert torch.equal(found, logits)
    assert same(applied.record, run.record)


def test_each_invoke_has_a_controller_of_its_own():
    case = Case("caa", "nnsight")
    model, one, other = case.model, case.controller, everywhere(case)
    with sl.steer(model, one) as first:
        expected_first = case.logits(PAIR[:1])
    with sl.steer(model, other) as second:
        expected_second = case.logits(PAIR[1:])
    with model.trace() as tracer:
        with tracer.invoke(PAIR[:1]):
            a = sl.apply(model, one)
            logits_first = model.output.logits.save()
        with tracer.invoke(PAIR[1:]):
            b = sl.apply(model, other)
            logits_second = model.output.logits.save()
    case.close(logits_first, expected_first, "the first invoke")
    case.close(logits_second, expected_second, "the second invoke")
    assert set(a.record) == set(first.record)
    assert set(b.record) == set(second.record)


def test_under_steer_and_twice_it_acts_as_nested_steering():
    case = Case("caa", "nnsight")
    model, one, other = case.model, case.controller, everywhere(case)
    with sl.steer(model, other), sl.steer(model, one), sl.steer(model, other) as run:
        logits = case.logits(IDS)
    with sl.steer(model, other), model.trace(IDS):
        sl.apply(model, one)
        last = sl.apply(model, other)
        found = model.output.logits.save()
    assert torch.equal(found, logits)
    assert same(last.record, run.record)


class Failing(sl.Law):
    def act(self, x, now):
        if x.any():
            raise ArithmeticError("the law fails on purpose")
        return torch.zeros_like(x), {}


def test_a_law_that_raises_leaves_nothing():
    case = Case("caa", "nnsight")
    model, plain = case.model, case.logits(IDS)
    failing, before = sl.Controller([sl.Loop(Failing(), sl.Site(1))]), snapshot(case.model)
    with pytest.raises(ArithmeticError, match="on purpose"), model.trace(IDS):
        sl.apply(model, failing)
        model.output.logits.save()
    assert snapshot(model) == before
    assert torch.equal(case.logits(IDS), plain)


def test_what_cannot_be_applied_is_told():
    case = Case("caa", "nnsight")
    model, controller = case.model, case.controller
    with pytest.raises(RuntimeError, match=r"apply\(\) was called outside of a trace"):
        sl.apply(model, controller)
    with pytest.raises(RuntimeError, match="call it once, first in its block"), model.trace(IDS):
        model.model.layers[0].output.save()
        sl.apply(model, controller)
    with pytest.raises(RuntimeError, match="outside of loops"), model.generate(IDS, max_new_tokens=3) as tracer:
        for _ in tracer.iter[:3]:
            sl.apply(model, controller)
            model.model.layers[0].output.save()
    deep = sl.Controller([sl.Loop(controller.loops[0].law, sl.Site(99))])
    with pytest.raises(ValueError, match=r"no hook point 'blocks\.99"), model.trace(IDS):
        sl.apply(model, deep)
    with pytest.raises(TypeError, match="takes a Controller"), model.trace(IDS):
        sl.apply(model, "caa")


@pytest.mark.parametrize("host", [host for host in discover_hosts() if host != "nnsight"])
def test_other_hosts_are_sent_to_steer(host, tiny_model):
    with pytest.raises(TypeError, match=r"is steered with steer\(model, controller\)"):
        sl.apply(tiny_model(host), Case("caa", "nnsight").controller)


def test_the_package_as_a_value_has_apply_only():
    """nnsight registers the package to be sent, so this is what pickle makes of `sl` in a block."""
    stand_in = pickle.loads(pickle.dumps(sl))
    assert stand_in.apply.func is importlib.import_module("steerlens.hosts.traced.explicit").apply_here
    with pytest.raises(AttributeError, match=r"a server has no steerlens\.Controller: .* from steerlens import Con"):
        stand_in.Controller  # noqa: B018


def test_an_invoke_that_only_steers_leaves_the_rows_of_others_alone():
    """Nobody waits for a value then but the controller, of whose batch half the rows are."""
    case = Case("lqr", "nnsight", options={"paper": True})
    controller, model = case.controller, case.model
    plain = case.logits(PAIR)
    with case.steer():
        steered = case.logits(PAIR)
    with model.trace() as tracer:
        with tracer.invoke(PAIR[:1]):
            sl.apply(model, controller)
        with tracer.invoke(PAIR[1:]):
            pass
        with tracer.invoke():
            both = model.output.logits.save()
    case.close(both[:1], steered[:1], "the steered row")
    case.close(both[1:], plain[1:], "the other row")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with model.generate(**options) as tracer:
        with tracer.invoke(PAIR[:1]):
            sl.apply(model, controller)
        with tracer.invoke(PAIR[1:]):
            pass
        with tracer.invoke():
            tokens = tracer.result.save()
    assert torch.equal(tokens[1:], case.generate(PAIR[1:], 4))
    with case.steer():
        assert torch.equal(tokens[:1], case.generate(PAIR[:1], 4))


@pytest.mark.parametrize("options", [{"prefill_chunk_size": 3}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 2}])
def test_a_generation_is_followed_as_in_steer(options):
    case = Case("caa", "nnsight")
    model, controller, before = case.model, case.controller, snapshot(case.model)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False} | options
    with sl.steer(model, controller, record="all") as run:
        with model.generate(IDS, **options) as tracer:
            tokens = tracer.result.save()
        expected = run.record.copy()
    with model.generate(IDS, **options) as tracer:
        applied = sl.apply(model, controller, record="all")
        found = tracer.result.save()
    assert torch.equal(found, tokens)
    assert same(applied.record, expected)
    assert snapshot(model) == before


def test_remote_false_is_generation_here():
    case = Case("caa", "nnsight")
    options = {"max_new_tokens": 4, "do_sample": False}
    with case.steer():
        expected = case.model.generate(IDS, **options)
        assert torch.equal(case.model.generate(IDS, **options, remote=False), expected)
        with case.model.generate(IDS, **options, remote=False) as tracer:
            tokens = tracer.result.save()
    assert torch.equal(tokens, expected)


def test_scored_tokens_are_steered_as_generated_ones():
    case = Case("lqr", "nnsight", options={"paper": True})
    model, controller = case.model, case.controller
    with model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False) as tracer:
        applied = sl.apply(model, controller, record="all")
        tokens = tracer.result.save()
    with model.trace(tokens[:, :-1]):
        scored = sl.apply(model, controller, record="all", prompt_lengths=IDS.shape[1])
        model.output.logits.save()
    for name, value in applied.record.items():
        torch.testing.assert_close(scored.record[name], value, rtol=1e-4, atol=1e-4, equal_nan=True)
    with pytest.raises(ValueError, match="at least one token"), model.trace(IDS):
        sl.apply(model, controller, prompt_lengths=0)
