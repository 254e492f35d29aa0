"""Other texts inside a generation, fits inside a steered block, copies, and what a library does around its passes."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from functools import cache

import pytest
import torch

import steerlens as sl
from steerlens.core import tensors_of
from steerlens.models import tiny
from steerlens.testing import Case, discover_hosts, snapshot
from tests.reference import Push
from tests.sequence_cases import PAD, Draw, Library, Seen, compare, controls_of, gated, generation, loops, moved

HOSTS = discover_hosts()
HUGGING = [name for name in ("bridge", "nnsight") if name in HOSTS]
BRIDGE = [name for name in ("bridge",) if name in HOSTS]
HOOKED = ["hooked"] if "hooked" in HOSTS else []
TEXT = [3, 17, 25, 29, 41, 22, 46]
OTHER = [5, 9, *[7] * 10]


@cache
def library(name, family="llama"):
    return Library(name, family)


def attempt(call, word):
    """A result, or None for an error of ours whose sentence has this word."""
    try:
        return call()
    except (RuntimeError, ValueError) as error:
        if word not in str(error):
            raise
        return None


# -- 5. another text inside a generation -----------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["last", "generated", "all"])
@pytest.mark.parametrize("name", [*BRIDGE, *HOOKED])
def test_a_look_at_another_text_leaves_the_generation_alone(name, where):
    """A user's own hook runs the model on another text at the third token."""
    lib, controller = library(name), sl.schedule(gated(loops(where), threshold=-9.0), [1.0, 0.5, 0.8])
    count = [0, False]

    def look(x, hook):
        if not count[1]:
            count[0] += 1
            if count[0] == 3:
                count[1] = True
                lib.model(torch.tensor([OTHER]))
                count[1] = False

    with lib.model.hooks(fwd_hooks=[("ln_final.hook_normalized", look)]):
        seen = generation(lib, [TEXT], 6, controller)
    compare(seen, lib.reference(controller), forbidden=lib.forbidden)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", HUGGING)
def test_a_judge_in_a_stopping_criterion_leaves_the_generation_alone(name, cached):
    """Also a judge that generates."""
    lib, controller = library(name), gated(loops("all"), threshold=-9.0)

    def judge(ids, scores, **_):
        with torch.no_grad():
            lib.inner(input_ids=torch.tensor([OTHER]), use_cache=cached)
            lib.inner.generate(torch.tensor([OTHER[:3]]), max_new_tokens=2, do_sample=False, pad_token_id=PAD)
        return torch.zeros(len(ids), dtype=torch.bool)

    seen = generation(lib, [TEXT], 5, controller, stopping_criteria=[judge])
    seen.controls = {}  # the record is that of the latest sequence, which was the judge's
    compare(seen, lib.reference(controller), forbidden=lib.forbidden)


@pytest.mark.parametrize("where", ["last", "generated", "all"])
@pytest.mark.parametrize("name", HUGGING)
def test_guidance_steers_each_of_its_two_texts_by_its_own_positions(name, where):
    """The second text is the last prompt token and what follows; both are steered, each as a sequence of its own."""
    lib, controller, scale = library(name), loops(where), 1.5
    ids = torch.tensor([TEXT])
    for cached in (True, False):
        with sl.steer(lib.model, controller):
            out = lib.generate(ids, torch.ones_like(ids), 5, guidance_scale=scale, use_cache=cached)
        tokens = out.sequences[0].tolist()
        whole = lib.reference(controller).row(tokens, len(TEXT))[0].log_softmax(-1)[len(TEXT) - 1 : -1]
        short = lib.reference(controller).row(tokens[len(TEXT) - 1 :], 1)[0].log_softmax(-1)[:-1]
        mixed = scale * (whole - short) + short
        mixed[:, lib.forbidden] = -torch.inf
        short_of = mixed.max(-1).values - mixed.gather(1, out.sequences[0, len(TEXT) :, None])[:, 0]
        assert (short_of < 1e-3).all(), f"use_cache={cached}: {short_of.tolist()}"


# -- 8. and 8b. tangents under beams and in padded batches -----------------------------------------------------------


@pytest.mark.parametrize("where", ["last", "all"])
@pytest.mark.parametrize("kind", ["beams", "padded", "greedy"])
@pytest.mark.parametrize("name", HUGGING)
def test_tangents_are_the_same_with_a_cache_and_without(name, kind, where):
    case = Case("cold_fd", name, model=library(name).model)
    controller = case.fit().at(where) * 2
    texts = [TEXT[:4], TEXT] if kind == "padded" else [TEXT]
    options = {"num_beams": 3, "num_return_sequences": 3, "output_scores": True} if kind == "beams" else {}
    longest = max(map(len, texts))
    ids = torch.tensor([[PAD] * (longest - len(text)) + text for text in texts])
    with sl.steer(case.model, controller, record="all") as run:
        both, controls = [], []
        for cached in (True, False):
            both.append(library(name).generate(ids, (ids != PAD).long(), 6, use_cache=cached, **options))
            controls.append(controls_of(run))
    assert torch.equal(*(out.sequences for out in both))
    for site, u in controls[0].items():
        torch.testing.assert_close(u, controls[1][site], rtol=1e-3, atol=1e-4)
    if kind == "beams":
        assert moved(both[0].beam_indices)
        torch.testing.assert_close(*(out.sequences_scores for out in both), rtol=1e-4, atol=1e-5)


# -- 9. and 10. HookedTransformer's own ways to run a part, and to shape a cache --------------------------------------


@pytest.mark.parametrize("name", HOOKED)
def test_the_second_half_of_a_pass_is_that_of_its_own_text_or_one_error(name):
    lib, controller = library(name), loops("all")
    first, second = torch.tensor([TEXT]), torch.tensor([OTHER])
    with torch.no_grad(), sl.steer(lib.model, controller):
        whole = lib.model(first)
        middle = lib.model(first, stop_at_layer=2)
        lib.model(second, stop_at_layer=2)
        halves = attempt(lambda: lib.model(middle, start_at_layer=2), "start_at_layer")
        if halves is not None:
            torch.testing.assert_close(halves, whole, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(lib.model(first), whole)


@pytest.mark.parametrize("name", HOOKED)
def test_signals_follow_the_options_of_a_cache(name):
    lib = library(name)
    controller = sl.lqr(lib.model, Case("lqr", name).data, progress=False)
    ids = torch.tensor([TEXT])
    with torch.no_grad(), sl.steer(lib.model, controller):
        whole = lib.model.run_with_cache(ids)[1]
        single = lib.model.run_with_cache(ids, remove_batch_dim=True)[1]
        for part in (-1, slice(1, 3)):
            cut = lib.model.run_with_cache(ids.repeat(2, 1), pos_slice=part)[1]
            state, error = cut["blocks.2.hook_resid_post"], cut["blocks.2.hook_steer_error"]
            assert state.shape[:-1] == error.shape
            expected = whole["blocks.2.hook_steer_error"][0][part].reshape(error[0].shape)  # some keep an axis of one
            torch.testing.assert_close(error[0], expected, equal_nan=True)
        only = lib.model.run_with_cache(ids, names_filter=lambda name: name.endswith("steer_error"), device="cpu")[1]
    torch.testing.assert_close(single["steer_error", 2], whole["steer_error", 2][0], equal_nan=True)
    assert set(only) == {f"blocks.{layer}.hook_steer_error" for layer in controller.layers}


# -- 12. fits inside a steered block ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["caa", "pid", "hpr", "sadi", "lqr", "cold_fd", "odesteer"])
@pytest.mark.parametrize("host", HOSTS)
def test_a_fit_inside_a_steered_block_reads_the_unsteered_model(host, method):
    if method == "cold_fd" and host == "hooked":
        pytest.skip("a HookedTransformer's parameters are not the model's")
    case = Case(method, host, model=library(host).model)
    plain, ids = case.fit(), torch.tensor([TEXT])
    with sl.steer(case.model, loops("all"), record="all") as run:
        steered, before = case.logits(ids), controls_of(run)
        inside = case.fit()
        after = controls_of(run)
        assert torch.equal(case.logits(ids), steered)
    assert before.keys() == after.keys()
    assert all(torch.equal(u, after[site]) for site, u in before.items()), "the fit is in the run's record"
    for a, b in zip(plain.loops, inside.loops, strict=True):
        for x, y in zip(*(tensors_of(loop.parts) for loop in (a, b)), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


# -- 13. what is attached to a model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS)
def test_runs_of_a_model_are_found_and_cleared(host):
    model = tiny(host=host)
    before = snapshot(model)
    first = sl.steer(model, loops())
    with pytest.warns(UserWarning, match="attached"):
        second = sl.steer(model, first.controller)
    third = sl.steer(model, loops("all"))
    assert list(sl.runs(model)) == [first, second, third]
    first.remove()
    assert list(sl.runs(model)) == [second, third]
    sl.clear(model)
    assert not list(sl.runs(model))
    assert snapshot(model) == before


@pytest.mark.parametrize("sign", [1, -1], ids=["opens", "closes"])
@pytest.mark.parametrize("name", HOSTS)
def test_a_gate_decides_on_the_prompt_that_no_other_run_has_steered(name, sign):
    """The other run pushes the state that the gate reads across its threshold, attached before it or after it."""
    lib, gate = library(name), gated(loops("all"), layer=0)
    push = sl.Controller([sl.Loop(Push(sign * 9 * Draw(12).unit(32)), sl.Site(0, "resid_pre"), where="all")])
    both = lib.reference(sl.Controller([*push.loops, *gate.loops]))
    text = next(
        text
        for text in ([3, 17, first, 29, first] for first in range(90))
        if lib.reference(gate).row(text, 5)[1][sl.Site(1)].any() == (sign < 0)
    )
    ids, scale = torch.tensor([text]), {"rtol": 1e-3, "atol": 1e-3}
    for pair in ((push, gate), (gate, push)):
        with sl.steer(lib.model, pair[0]):
            with sl.steer(lib.model, pair[1]):
                torch.testing.assert_close(lib.logits(ids)[0], both.row(text, 5)[0], **scale)
                tokens = lib.generate(ids, torch.ones_like(ids), 3).sequences[0].tolist()
                wanted = both.row(tokens, 5)[0]
                if lib.forbidden is not None:
                    wanted[:, lib.forbidden] = -torch.inf
                assert wanted[4:-1].argmax(-1).tolist() == tokens[5:]
            torch.testing.assert_close(lib.logits(ids)[0], lib.reference(pair[0]).row(text, 5)[0], **scale)


# -- 14. copies, dropped models, interrupts --------------------------------------------------------------------------


@pytest.mark.parametrize("host", [name for name in HOSTS if name != "nnsight"])
def test_a_deep_copy_of_a_steered_model_is_plain(host):
    """It shares nothing with the model, which is steered as before; with weights of its own it computes with them."""
    case = Case("caa", host, model=tiny(host=host))
    ids = torch.tensor([TEXT])

    def results(each):
        return each.logits(ids), each.generate(ids, 4)

    def same(a, b):
        return all(torch.equal(*pair) for pair in zip(a, b, strict=True))

    plain, before = results(case), snapshot(case.model)
    with sl.steer(case.model, loops("all")):
        steered = results(case)
        assert not torch.equal(steered[0], plain[0])
        twin = Case("caa", host, model=copy.deepcopy(case.model))
        assert not sl.runs(twin.model)
        assert {**snapshot(twin.model), "weights": 0} == {**before, "weights": 0}
        assert same(results(twin), plain)
        assert same(results(case), steered)
        for parameter in twin.model.parameters():
            parameter.data.mul_(-1.1)
        changed = results(twin)
        assert not any(torch.equal(*pair) for pair in zip(changed, plain, strict=True))
        assert same(results(case), steered)
    assert same(results(twin), changed)
    assert same(results(case), plain)


@pytest.mark.parametrize("host", HOSTS)
def test_a_model_dropped_while_steered_is_freed(host):
    model = tiny(host=host)
    weak = weakref.ref(model)
    run = sl.steer(model, loops())
    Case("caa", host, model=model).logits(torch.tensor([TEXT]))
    del run, model
    gc.collect()
    gc.collect()
    assert weak() is None


# -- 15. training tools and others -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["caa", "lqr", "sadi", "odesteer"])
@pytest.mark.parametrize("host", HOSTS)
def test_a_fit_under_inference_mode_gives_the_same_controller(host, method):
    case = Case(method, host, model=library(host).model)
    plain = case.fit()
    with torch.inference_mode():
        inside = case.fit()
    ids = torch.tensor([TEXT])
    logits = []
    for controller in (plain, inside):
        with sl.steer(case.model, controller, where="all"):
            logits.append(case.logits(ids))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BRIDGE)
def test_gradient_checkpointing_gives_the_same_gradients(name):
    """A block is run a second time on the way back."""
    lib = Library(name)
    ids, vector = torch.tensor([TEXT]), torch.zeros(32, requires_grad=True)
    controller = sl.Controller([sl.Loop(sl.Add(vector), sl.Site(1), where="all")])
    found = []
    for on in (False, True):
        if on:
            lib.inner.gradient_checkpointing_enable({"use_reentrant": False})
            lib.inner.train()
        with torch.enable_grad(), sl.steer(lib.model, controller), warnings.catch_warnings():
            warnings.simplefilter("ignore")

            def gradient():
                loss = lib.inner(input_ids=ids, use_cache=False).logits[0, -1].square().mean()
                return torch.autograd.grad(loss, vector)[0]

            found.append(attempt(gradient, "checkpoint"))
    if found[1] is not None:
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", HUGGING)
def test_a_long_conversation_with_everything_at_once(name):
    """Padded batch, gate, schedule, negative slice, sampling with several rows a prompt."""
    lib = library(name)
    torch.manual_seed(1)
    controller = sl.schedule(gated(loops(slice(-2, None))), [1.0, 0.3])
    seen = generation(lib, [TEXT[:3], TEXT], 5, controller, do_sample=True, num_return_sequences=2)
    compare(seen, lib.reference(controller), produced="sampled")


def test_an_interrupt_at_any_step_of_attaching_leaves_the_model_attached_or_not(host):
    """Ctrl-C is raised at each call that `steer` and `remove` make, one after the other."""
    import sys

    model = tiny(host=host)
    before = snapshot(model)

    def attach(at):
        """The number of calls that were made."""
        calls = [0]

        def trace(frame, event, argument):
            if event == "call" and "/steerlens/" in frame.f_code.co_filename:
                calls[0] += 1
                if calls[0] == at:
                    raise KeyboardInterrupt

        sys.settrace(trace)
        try:
            sl.steer(model, loops()).remove()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        sl.clear(model)
        assert snapshot(model) == before, f"an interrupt at call {at} leaves something behind"
        return calls[0]

    attach(None)
    whole = attach(None)
    for at in range(1, whole + 1, 3):
        attach(at)


def test_the_forms_of_where_do_not_depend_on_the_draw():
    """The generator of cases gives each form of `where`."""
    kinds = {type(Draw(seed).where()).__name__ for seed in range(60)}
    assert kinds == {"str", "slice", "Tensor", "function", "Span"}


def test_a_row_that_lacks_a_control_is_seen():
    """The comparison itself: a control moved by one token does not pass."""
    lib = library(HOSTS[0])
    seen = generation(lib, [TEXT], 3, loops("all"))
    compare(seen, lib.reference(loops("all")), forbidden=lib.forbidden)
    moved = Seen(seen.run, seen.tokens, seen.prompts, seen.starts, {}, controls_of(seen.run))
    moved.controls = {site: u.roll(1, 1) for site, u in moved.controls.items()}
    with pytest.raises(AssertionError, match="other controls"):
        compare(moved, lib.reference(loops("all")), forbidden=lib.forbidden)
