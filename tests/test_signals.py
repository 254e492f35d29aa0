"""A loop's signals are the same on every host: names, shapes, values; and zeroing a control is leaving its loop out."""

from __future__ import annotations

import pytest
import torch

import steerlens as sl
from steerlens.testing import Case, discover_hosts

IDS = torch.tensor([[3, 17, 25, 29, 41, 22, 9], [7, 30, 31, 32, 33, 8, 2]])
METHODS = ["lqr", "pid", "caa", "sadi", "odesteer", "ablation"]
LENS = [host for host in discover_hosts() if host != "nnsight"]


def controller_of(case):
    """Two loops at one layer, loops at several, and one that acts on another point."""
    both = case.controller + case.controller * 0.5
    vector = torch.linspace(-1, 1, 32)
    return both + sl.Controller([sl.Loop(sl.Add(vector), sl.Site(1, "attn_out"), where="all", name="nudge")])


def tolerance(case, value):
    return case.tolerance * max(1.0, float(value.nan_to_num().abs().max())) * 10


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("host", LENS)
def test_hook_points_equal_nnsights_record(host, method):
    """Names, shapes and dtypes exactly, values to rounding: cached here, recorded there, in one pass and in generation.

    Each host fits its own controller; what differs is the order of additions in float32.
    """
    case = Case(method, host)
    controller = controller_of(case)
    reference = case.other(host=discover_hosts()[-1])
    with torch.no_grad(), reference.steer(controller=controller, record="all") as run:
        reference.logits(IDS)
        single = run.record.copy()
        tokens = reference.generate(IDS)
        generated = run.record.copy()
    with torch.no_grad(), case.steer(controller=controller, record="all") as run:
        _, cache = case.model.run_with_cache(IDS)
        own = run.record.copy()
        assert torch.equal(case.generate(IDS), tokens)
        decoded = run.record.copy()
    assert {name for name in cache if "hook_steer_" in name} == set(own)
    for name, value in own.items():
        assert torch.equal(cache[name].nan_to_num(), value.nan_to_num()), f"{name}: cache and record differ"
    for mine, theirs in ((own, single), (decoded, generated)):
        assert set(mine) == set(theirs)
        for name, value in theirs.items():
            assert mine[name].shape == value.shape
            assert mine[name].dtype == value.dtype
            torch.testing.assert_close(
                mine[name],
                value,
                rtol=0,
                atol=tolerance(case, value),
                equal_nan=True,
                msg=lambda m, n=name: f"{n}: {m}",
            )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("host", LENS)
def test_zeroing_a_recorded_control_is_leaving_its_loop_out(host, method):
    """To the last bit: patched through its own hook point, against a controller in which the loop has strength 0."""
    case = Case(method, host)
    controller = controller_of(case)
    with torch.no_grad():
        with case.steer(controller=controller) as run:
            names = [name for site in run.signals.values() for name in (own["u"] for own in site.own)]
            order = [index for site in run.signals for index, loop in enumerate(controller.loops) if loop.act == site]
            patched = {
                index: case.model.run_with_hooks(IDS, fwd_hooks=[(name, lambda u, hook: 0 * u)])
                for name, index in zip(names, order, strict=True)
            }
            whole = case.logits(IDS)
        for index, logits in patched.items():
            loops = list(controller.loops)
            loops[index] = loops[index].replace(strength=0.0)
            with case.steer(controller=sl.Controller(loops, controller.recipe)):
                assert torch.equal(case.logits(IDS), logits), f"loop {index}: {loops[index]}"
    assert any(not torch.equal(logits, whole) for logits in patched.values())


@pytest.mark.parametrize("host", LENS)
def test_a_loop_without_memory_may_as_well_be_taken_out(host):
    """For laws that keep nothing for later ones, strength 0 and no loop at all are the same."""
    case = Case("lqr", host, options={"paper": True})
    controller = case.controller
    with torch.no_grad():
        for layer in controller.layers:
            loops = [loop for loop in controller.loops if loop.act.layer != layer]
            with case.steer(controller=sl.Controller(loops, controller.recipe)):
                expected = case.logits(IDS)
            with case.steer(controller=controller):
                hooks = [(f"blocks.{layer}.hook_steer_u", lambda u, hook: 0 * u)]
                assert torch.equal(case.model.run_with_hooks(IDS, fwd_hooks=hooks), expected)


@pytest.mark.parametrize("host", LENS)
def test_a_patched_control_can_come_from_another_prompt(host):
    """A signal is an ordinary activation: replayed from a record, the loops act as they did there."""
    case = Case("lqr", host, options={"paper": True})
    names = [f"blocks.{layer}.hook_steer_u" for layer in case.controller.layers]
    with torch.no_grad(), case.steer(record="all") as run:
        case.logits(IDS)
        donor = run.record.copy()
        hooks = [(name, lambda u, hook, name=name: donor[name].flip(0)) for name in names]
        swapped = case.model.run_with_hooks(IDS.flip(0), fwd_hooks=hooks)
        own = case.logits(IDS.flip(0))
    torch.testing.assert_close(swapped, own, rtol=0, atol=1e-5)
