"""Levels counted from the token's own unsteered state, against two forward passes by hand with plain PyTorch hooks."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
import torch

import steerlens as sl
from steerlens.core import Now
from steerlens.laws.feedback import Add
from steerlens.laws.relative import Relative
from steerlens.models import tiny
from steerlens.testing import Case, discover_hosts, padding
from tests.sequence_cases import PAD, Library

HOSTS = discover_hosts()
HUGGING = [name for name in ("bridge", "nnsight") if name in HOSTS]
TEXT, OTHER = [3, 17, 25, 29, 41, 22, 46], [7, 30, 31, 32, 33]


@cache
def plain_model():
    """A Hugging Face model with the weights of every tiny llama, which no library has wrapped."""
    return tiny("llama", host="hf")[0]


def layers_of(model, hooks, ids):
    """Logits of one pass under plain hooks `{layer: (on input, on output)}`."""
    handles = []
    for layer, (before, after) in hooks.items():
        block = model.model.layers[layer]
        handles.append(block.register_forward_pre_hook(lambda _, args, f=before, t=layer: f(t, args[0])))
        if after is not None:

            def changed(_, args, output, f=after, t=layer):
                first = output if isinstance(output, torch.Tensor) else output[0]
                steered = f(t, first)
                return steered if isinstance(output, torch.Tensor) else (steered, *output[1:])

            handles.append(block.register_forward_hook(changed))
    try:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def by_hand(ids, steered, controls):
    """Logits of a text of which some positions are steered, and the shifts before each block.

    Args:
        steered: Positions.
        controls: By layer, what makes a control of the deviations so far: `[pos d] -> [pos d]`.
    """
    model, own, seen, shifts = plain_model(), {}, {}, {}
    mask = torch.zeros(len(ids), 1)
    mask[steered] = 1

    def keep(table):
        return lambda t, x: table.__setitem__(t, x[0].clone())

    def add(t, y):
        shifts[t] = seen[t] - own[t]
        return y + (mask * controls[t](shifts[t]))[None]

    layers_of(model, {t: (keep(own), None) for t in controls}, ids)
    return layers_of(model, {t: (keep(seen), add) for t in controls}, ids), shifts


def proportional(controller):
    """The controls of `lqr`, written anew from the tensors alone: `g (beta - <v, shift>)`."""
    found = {}
    for loop in controller.loops:
        feedback = loop.law.law
        v, beta, g = feedback.setpoint.basis[0], feedback.setpoint.level, feedback.gains[0]
        found[loop.act.layer] = lambda d, v=v, beta=beta, g=g: (beta - d @ v)[:, None] * g
    return found


@cache
def fitted(host, method="lqr", **options):
    case = Case(method, host)
    return case, case.fit(origin="own", **options)


@pytest.mark.parametrize("level", [1.0, -2.0])
def test_a_generation_is_what_two_passes_by_hand_give(host, level):
    """Greedy, with a cache and without, and scored; the reference knows no cache and steers the whole text at once."""
    case, controller = fitted(host, level=level)
    ids, controls = torch.tensor([TEXT]), proportional(controller)
    with case.steer(controller=controller, record="all") as run:
        both = [case.generate(ids, 5, cache=cached) for cached in (True, False)]
        record = run.record.copy()
        with run.scoring([len(TEXT)]), torch.no_grad():
            scored = case.logits(both[0])[0]
    tokens = both[0][0].tolist()
    assert both[1][0].tolist() == tokens
    logits, shifts = by_hand(tokens, range(len(TEXT) - 1, len(tokens)), controls)
    torch.testing.assert_close(scored.detach(), logits, rtol=1e-4, atol=1e-4)
    assert logits[len(TEXT) - 1 : -1].argmax(-1).tolist() == tokens[len(TEXT) :]
    for loop in controller.loops:
        t, setpoint = loop.act.layer, loop.law.law.setpoint
        steered = slice(len(TEXT) - 1, None)
        shift = (shifts[t] @ setpoint.basis[0])[steered]
        names = ("projection", "reference", "error")
        moved, own, error = (record[f"blocks.{t}.hook_steer_{name}"][0, steered] for name in names)
        torch.testing.assert_close(moved - own, shift[: len(moved)], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(error, (setpoint.level - shift).abs()[: len(moved)], rtol=1e-3, atol=1e-4)


def test_pid_over_the_layers_is_what_two_passes_by_hand_give(host):
    case, controller = fitted(host, method="pid", kp=0.4, ki=0.05, kd=0.2, reset_every=None)
    memory = {"sum": 0.0, "last": 0.0}
    controls = {}
    for loop in controller.loops:
        setpoint = loop.law.law.setpoint

        def control(d, v=setpoint.basis[0], beta=setpoint.level):
            e = (beta - d @ v)[:, None] * v
            change = e - memory["last"]
            memory["sum"], memory["last"] = memory["sum"] + e, e
            return 0.4 * e + 0.05 * memory["sum"] + 0.2 * change

        controls[loop.act.layer] = control
    expected, _ = by_hand(TEXT, range(1, len(TEXT)), controls)
    with case.steer(controller=controller, where="all"):
        torch.testing.assert_close(case.logits(torch.tensor([TEXT]))[0].detach(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["lqr", "pid"])
def test_level_zero_is_off_to_the_last_bit(host, method):
    """Passes, generations with and without a cache, padded batches and scores; with records and without."""
    case, controller = fitted(host, method=method, level=0.0)
    ids = torch.tensor([TEXT, OTHER + OTHER[:2]])
    row = torch.tensor([[PAD, PAD, *OTHER], TEXT])
    mask = torch.ones_like(row)
    mask[0, :2] = 0

    def everything(run=None):
        with padding(case.model, "left"):
            found = [case.logits(ids), case.logits(row, mask)]
        found += [case.generate(ids, cache=cached) for cached in (True, False)]
        if run is not None:
            with run.scoring([3, 4]):
                found.append(case.logits(ids))
        else:
            found.append(case.logits(ids))
        return found

    expected = everything()
    for record in ("all", None):
        for where in ("last", "all"):
            with case.steer(controller=controller, record=record, where=where) as run:
                for mine, plain in zip(everything(run), expected, strict=True):
                    assert torch.equal(mine, plain)


@pytest.mark.parametrize("name", HUGGING)
def test_level_zero_is_off_in_a_beam_search(name):
    _, controller = fitted(name, level=0.0)
    library, ids = Library(name), torch.tensor([TEXT])
    plain = library.generate(ids, torch.ones_like(ids), 5, num_beams=3).sequences
    with sl.steer(library.model, controller):
        assert torch.equal(library.generate(ids, torch.ones_like(ids), 5, num_beams=3).sequences, plain)


@pytest.mark.parametrize("kind", ["beams", "padded"])
@pytest.mark.parametrize("name", HUGGING)
def test_references_are_the_same_with_a_cache_and_without(name, kind):
    _, controller = fitted(name)
    library = Library(name)
    texts = [TEXT[:4], TEXT] if kind == "padded" else [TEXT]
    ids = torch.tensor([[PAD] * (len(TEXT) - len(text)) + text if kind == "padded" else text for text in texts])
    options = {"num_beams": 3} if kind == "beams" else {}
    with sl.steer(library.model, controller):
        both = [
            library.generate(ids, (ids != PAD).long(), 5, use_cache=cached, **options).sequences
            for cached in (True, False)
        ]
    assert torch.equal(*both)


def test_another_run_does_not_move_the_reference(host):
    """What another run adds is in the state and not in the reference, so that a loop works against it."""
    case, controller = fitted(host)
    push = sl.Controller([sl.Loop(Add(3 * torch.ones(32)), 0, where="all")])
    ids, name = torch.tensor([TEXT]), "blocks.2.hook_steer_reference"
    with case.steer(controller=controller) as run:
        case.logits(ids)
        alone = run.record[name].clone()
        with case.steer(controller=push):
            case.logits(ids)
            beside = run.record[name].clone()
    torch.testing.assert_close(beside, alone, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("cached", [True, False])
def test_hooks_of_the_users_own_see_the_steered_passes_only(host, cached):
    """Plain PyTorch hooks of every module, before and behind it, are called as often as they are unsteered."""
    case, controller = fitted(host)
    calls, handles, ids = Counter(), [], torch.tensor([TEXT])
    for name, module in getattr(case.model, "_module", case.model).named_modules():
        handles.append(module.register_forward_hook(lambda *_, name=name: calls.update([name])))
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: calls.update([f"{name}, before"])))
    case.generate(ids, 4, cache=cached)
    unsteered = calls.copy()
    calls.clear()
    with case.steer(controller=controller):
        case.generate(ids, 4, cache=cached)
    for handle in handles:
        handle.remove()
    block = next(name for name in unsteered if name.endswith((".0", ".0._original_component")))
    assert unsteered[block] == 4
    assert calls == unsteered


def test_a_relative_controller_is_saved_and_loaded(host, tmp_path):
    case, controller = fitted(host)
    controller.save(tmp_path / "own.safetensors")
    loaded = sl.Controller.load(tmp_path / "own.safetensors")
    assert [loop.reference for loop in loaded.loops] == [sl.Site(loop.act.layer, "resid_pre") for loop in loaded.loops]
    found = []
    for each in (controller, loaded):
        with case.steer(controller=each):
            found.append(case.generate(torch.tensor([TEXT])))
    assert torch.equal(*found)


def test_several_concepts_and_the_preview_are_relative_too(host):
    """At a plant that is linear the preview has no constant: at level 0 it asks for nothing but what it predicts."""
    case = Case("lqr", host)
    other = sl.Pairs([[5, 9, 12], [8, 9, 35]], [[5, 9, 13], [8, 10, 46]])
    ids = torch.tensor([TEXT])
    plain = case.logits(ids)
    joint = case.fit([case.data, other], origin="own", level=[1.0, 0.0])
    ahead = case.fit(origin="own", solver="output", preview=True)
    for controller, names in ((joint, {"reference_0", "reference_1"}), (ahead, {"reference", "predicted_error"})):
        with case.steer(controller=controller, record="all") as run:
            assert (case.logits(ids) - plain).abs().max() > 1e-4
            assert names <= {name.rpartition("steer_")[2] for name in run.record}
    none = case.fit(origin="own", solver="output", preview=True, level=1e-9)
    with case.steer(controller=none):
        torch.testing.assert_close(case.logits(ids), plain, rtol=1e-5, atol=1e-5)


def test_a_relative_loop_needs_an_error_and_the_whole_text(host):
    case, controller = fitted(host)
    with pytest.raises(TypeError, match="Add has no setpoint"):
        Relative(Add(torch.ones(32)))
    with pytest.raises(LookupError, match=r"now\.reference was asked for"):
        controller.loops[0].law.act(torch.ones(1, 1, 32), Now())
    with pytest.raises(ValueError, match="needs a second pass over the text"):
        controller.fwd_hooks()
    with pytest.raises(ValueError, match="origin='zero'"):
        case.fit(origin="own", setpoint="angular")


def test_tracking_and_its_bound_follow_a_relative_loop():
    """Unsteered, every token is a whole level away; the error is what a run records, and the bound holds."""
    case, controller = fitted(HOSTS[0], full_gain=True)
    with case.steer(controller=controller) as run:
        case.logits(torch.tensor([TEXT]))
        found = sl.diagnose.tracking(case.model, TEXT, controller=controller.at("last"), record=run.record)
    levels = torch.cat([loop.law.law.setpoint.level for loop in controller.loops]).double()
    torch.testing.assert_close(found.unsteered, levels.abs(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.actual, found.recorded, rtol=1e-4, atol=1e-5)
    assert ((found.actual - found.predicted).abs() <= found.bound * (1 + 1e-4) + 1e-6).all()
    plant = sl.linearize(case.model, [TEXT], progress=False)
    costs = sl.diagnose.closed_loop(controller, linearization=plant, along=found)
    assert torch.isfinite(costs.predicted[controller.layers]).all()


def test_the_error_that_tracking_reports_is_that_of_the_shift():
    case, controller = fitted(HOSTS[0], full_gain=True)
    plant = sl.linearize(case.model, [TEXT], progress=False)
    path = sl.diagnose.tracking(case.model, TEXT, controller=controller.at("last"), linearization=plant, bound=False)
    shift = (path.rollout.states - path.rollout.own).double()
    for index, loop in enumerate(controller.loops):
        setpoint = loop.law.law.setpoint
        t = loop.act.layer
        expected = (setpoint.level - shift[t].float() @ setpoint.basis[0]).abs()
        torch.testing.assert_close(path.actual[index].float(), expected[0], rtol=1e-4, atol=1e-5)
