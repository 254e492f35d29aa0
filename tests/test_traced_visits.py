"""On nnsight a sensor takes the state from the visit before it, unless somebody else may act in between."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

import steerlens as sl
from steerlens.hosts import host_of
from steerlens.testing import Case, counts_of_steering, discover_hosts

walk = pytest.importorskip("steerlens.hosts.traced.walk")

pytestmark = pytest.mark.skipif("nnsight" not in discover_hosts(), reason="needs nnsight")
IDS = torch.tensor([[3, 17, 25, 29, 41, 22, 9]])
LAYER = 2


def double(module, args, output):
    return 2 * output if isinstance(output, torch.Tensor) else (2 * output[0], *output[1:])


def double_input(module, args, kwargs):
    kwargs = {name: 2 * x if name == "hidden_states" else x for name, x in kwargs.items()}
    return tuple(2 * x if isinstance(x, torch.Tensor) else x for x in args[:1]) + args[1:], kwargs


@contextmanager
def hooked(handle):
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def edited(case):
    block = case.model.model.layers[LAYER - 1]
    before = list(case.model._edits)
    with case.model.edit(inplace=True):
        block.output = double(None, None, block.output)
    try:
        yield
    finally:
        case.model._edits = before


@contextmanager
def nobody(case):
    yield


def intruder(name, case):
    """Doubles the state between block 1 and block 2, or everywhere, or nowhere."""
    before, block = (case.model.model.layers[layer]._module for layer in (LAYER - 1, LAYER))
    return {
        "nobody": lambda: nobody(case),
        "an edit": lambda: edited(case),
        "a hook after the block": lambda: hooked(before.register_forward_hook(double)),
        "a hook before the block": lambda: hooked(block.register_forward_pre_hook(double_input, with_kwargs=True)),
        "a global hook": lambda: hooked(
            register_module_forward_hook(lambda m, a, o: double(m, a, o) if m is before else None)
        ),
    }[name]()


@pytest.mark.parametrize(
    "name",
    [
        "nobody",
        "an edit",
        "a hook after the block",
        "a hook before the block",
        "a global hook",
    ],
)
def test_a_sensor_sees_what_reaches_the_block(name, tiny_model):
    case = Case("caa", "nnsight", model=tiny_model("nnsight"))
    d = case.model.model.layers[0]._module.input_layernorm.weight.shape[0]
    v = torch.nn.functional.normalize(torch.linspace(-1, 2, d), dim=0)
    sites = [(sl.Site(t, "resid_post"), sl.Site(t, "resid_pre")) for t in (LAYER - 1, LAYER)]
    loops = [sl.Loop(sl.Feedback(sl.Level(v, 3.0), v[None]), act, sense, where="all") for act, sense in sites]
    seen = []
    norm = case.model.model.layers[LAYER]._module.input_layernorm
    # a hook after the norm changes nothing and is told the norm's input
    watch = norm.register_forward_hook(lambda module, args, output: seen.append(args[0].detach().clone()))
    # the edit comes after the controller's, so that it acts between the actuator and the sensor
    with hooked(watch), sl.steer(case.model, sl.Controller(loops), record="all") as run, intruder(name, case):
        case.logits(IDS)
    state = seen[-1].float()
    key = f"blocks.{LAYER}.hook_steer_projection"
    torch.testing.assert_close(run.record[key][:, 1:], (state @ v)[:, 1:], rtol=1e-5, atol=1e-5)


def test_a_generation_is_the_same_with_a_second_edit_that_does_nothing(tiny_model):
    """The second edit makes every sensor visit its place; the tokens' logits are equal to the last bit."""
    case = Case("lqr", "nnsight", model=tiny_model("nnsight"), options={"paper": True})
    case.controller = case.fit()
    with sl.steer(case.model, case.controller, record="all") as run:
        alone = case.generate(IDS)
    nothing = sl.Add(torch.zeros(host_of(case.model).d_model))
    second = sl.Controller([sl.Loop(nothing, sl.Site(0), strength=0)])
    with sl.steer(case.model, case.controller, record="all") as beside, sl.steer(case.model, second):
        together = case.generate(IDS)
    assert torch.equal(alone, together)
    for name, value in run.record.items():
        if name in beside.record:
            torch.testing.assert_close(beside.record[name], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("method", ["lqr", "pid", "caa", "odesteer"])
def test_the_fast_path_is_the_plain_one(method, tiny_model, monkeypatch):
    """Behind one switch: tokens and record are equal to the last bit, and the fast path makes fewer calls."""
    case = Case(method, "nnsight", model=tiny_model("nnsight"))
    case.controller = case.fit()
    found, calls = {}, {}
    for fast in (True, False):
        monkeypatch.setattr(walk, "FAST", fast)
        with sl.steer(case.model, case.controller, record="all") as run:
            found[fast] = case.generate(IDS), dict(run.record)
        calls[fast] = counts_of_steering(case)
    assert torch.equal(found[True][0], found[False][0])
    assert found[True][1].keys() == found[False][1].keys()
    for name, value in found[True][1].items():
        torch.testing.assert_close(value, found[False][1][name], rtol=0, atol=0, equal_nan=True)
    assert calls[True].operations == calls[False].operations
    if len(case.controller.loops) > 1:
        assert calls[True].calls < calls[False].calls


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_pass_that_breaks_off_between_two_visits_leaves_nothing_behind(tiny_model, error):
    case = Case("lqr", "nnsight", model=tiny_model("nnsight"), options={"paper": True})
    case.controller = case.fit()
    block = case.model.model.layers[LAYER]._module

    def fail(*_):
        raise error("in the middle of the blocks")

    with case.steer() as run:
        before = case.logits(IDS)
        handle = block.register_forward_pre_hook(fail)
        with hooked(handle), pytest.raises(error, match="in the middle"):
            case.generate(IDS)
        assert all("handle" not in vars(edit) for edit in case.model._edits)
        assert torch.equal(case.logits(IDS), before)
        assert run.record["blocks.1.hook_steer_u_norm"].shape == IDS.shape


def test_a_law_that_raises_is_told_in_its_own_words(tiny_model):
    case = Case("caa", "nnsight", model=tiny_model("nnsight"))
    plain = case.logits(IDS)
    loop = sl.Loop(Late(), sl.Site(1), where="all")
    with sl.steer(case.model, sl.Controller([loop])):
        with pytest.raises(ZeroDivisionError, match="this law"):
            case.logits(IDS)
        assert all("handle" not in vars(edit) for edit in case.model._edits)
    assert torch.equal(case.logits(IDS), plain)


class Late(sl.Law):
    """Fails on more than the one token that `steer` tries it on."""

    def act(self, x, now):
        if x.shape[1] > 1:
            raise ZeroDivisionError("this law cannot divide")
        return torch.zeros_like(x), {}
