"""Fits that share readings: each text goes through the model once, and never a steered one."""

from threading import Thread

import pytest
import torch

import steerlens as sl
from steerlens.core.part import tensors_of
from steerlens.hosts import host_of
from steerlens.testing.case import NEGATIVE, POSITIVE

PAIRS = sl.Pairs(POSITIVE, NEGATIVE)


@pytest.fixture
def counted(tiny_model, host):
    """A tiny model, and the number of rows that have gone through its first block, by a plain PyTorch hook."""
    model = tiny_model(host)
    host_of(model).trust(sl.caa(model, PAIRS, layers="all").sites)  # the short pass that is made once
    rows = []
    handle = host_of(model).block.register_forward_hook(lambda block, given, found: rows.append(1))
    yield model, rows
    handle.remove()


def fits(model):
    """Methods that read the residual stream, at different layers, pooled alike."""
    return [
        *[sl.caa(model, PAIRS, layers=layer) for layer in range(4)],
        sl.mimic(model, PAIRS),
        sl.linear_act(model, PAIRS, layers="all"),
        sl.odesteer(model, PAIRS),
        sl.pid(model, PAIRS),
        sl.ablation(model, PAIRS, layers=[2]),
    ]


def same(one, other):
    a, b = tensors_of([loop.parts for loop in one]), tensors_of([loop.parts for loop in other])
    return len(a) == len(b) and all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in zip(a, b, strict=True))


def test_many_fits_cost_the_passes_of_one(counted):
    model, rows = counted
    alone = fits(model)
    rows.clear()
    sl.caa(model, PAIRS)
    one = len(rows)
    assert one == 2  # a batch for each side
    rows.clear()
    with sl.readings(model) as kept:
        shared = fits(model)
    assert len(rows) == one
    assert len(kept) == len(POSITIVE) + len(NEGATIVE)
    assert all(map(same, shared, alone))
    # the end of the context is the end of what is kept
    sl.caa(model, PAIRS)
    assert len(rows) == 2 * one


def test_a_new_text_a_new_pooling_and_a_new_point_are_read(counted):
    model, rows = counted
    wanted = sl.iti(model, PAIRS)  # also makes the short pass that a host may need once for a point
    with sl.readings(model):
        sl.caa(model, PAIRS)
        rows.clear()
        more = sl.caa(model, sl.Pairs([*POSITIVE, ([5], [6, 7])], NEGATIVE))
        assert len(rows) == 1
        mean = sl.caa(model, sl.Pairs(POSITIVE, NEGATIVE, read="mean"))
        assert len(rows) == 3
        iti = sl.iti(model, PAIRS)
        assert len(rows) == 5
        sl.iti(model, PAIRS, layers=[1])
        assert len(rows) == 5
    assert same(more, sl.caa(model, sl.Pairs([*POSITIVE, ([5], [6, 7])], NEGATIVE)))
    assert same(mean, sl.caa(model, sl.Pairs(POSITIVE, NEGATIVE, read="mean")))
    assert same(iti, wanted)


def test_steered_activations_are_never_kept(counted):
    model, _ = counted
    plain, push = sl.caa(model, PAIRS), sl.caa(model, PAIRS, layers=1, strength=5.0, where="all")
    with sl.readings(model):
        with sl.steer(model, push):
            inside = sl.caa(model, PAIRS)
        outside = sl.caa(model, PAIRS)
    assert same(inside, plain)
    assert same(outside, plain)


def test_a_model_that_changed_is_read_again(counted):
    model, rows = counted
    block = host_of(model).block
    with sl.readings(model):
        before = sl.caa(model, PAIRS)
        rows.clear()
        weight = max(block.parameters(), key=torch.numel)
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(1.5)
        changed = sl.caa(model, PAIRS)
        assert len(rows) == 2
        with torch.no_grad():
            weight.copy_(kept)
        handle = block.register_forward_hook(
            lambda module, given, found: (2 * found[0], *found[1:]) if isinstance(found, tuple) else 2 * found
        )
        hooked = sl.caa(model, PAIRS)
        handle.remove()
        after = sl.caa(model, PAIRS)
        assert len(rows) == 6
    assert not same(before, changed)
    assert not same(before, hooked)
    assert same(before, after)


def test_a_model_whose_parts_are_others_is_read_again(counted):
    """Also if a new weight lies where the old one did, which its address and its id then do not show."""
    model, rows = counted
    block = host_of(model).block
    module, name = next((m, n) for m in block.modules() for n, p in m._parameters.items() if p is not None and p.ndim)
    kept = getattr(module, name)
    with sl.readings(model):
        sl.caa(model, PAIRS)
        for number in range(8):
            rows.clear()
            shape = getattr(module, name).shape
            delattr(module, name)
            setattr(module, name, torch.nn.Parameter(torch.full(shape, 1.0 + number)))
            sl.caa(model, PAIRS)
            assert len(rows) == 2
        setattr(module, name, kept)
        forward = module.forward
        for _ in range(2):
            rows.clear()
            module.forward = lambda *given, **options: forward(*given, **options)
            sl.caa(model, PAIRS)
            assert len(rows) == 2
        del module.forward


def test_memory_is_bounded(counted):
    model, rows = counted
    with sl.readings(model, limit=0) as kept:
        nothing = sl.caa(model, PAIRS)
        assert (len(kept), kept.nbytes) == (0, 0)
    one_side = 3 * 5 * 32 * 4
    with sl.readings(model, limit=2 * one_side) as kept:
        sl.caa(model, PAIRS)
        assert kept.nbytes <= 2 * one_side
        rows.clear()
        assert same(sl.caa(model, PAIRS, layers=3), sl.caa(model, PAIRS, layers=3))
    assert same(nothing, sl.caa(model, PAIRS))
    with pytest.raises(ValueError, match="bytes"), sl.readings(model, limit=-1):
        pass


def test_contexts_of_one_model_share_what_is_kept_also_between_threads(counted):
    model, rows = counted
    found = []

    def fit():
        with sl.readings(model):
            found.append(sl.caa(model, PAIRS, layers=3))

    with sl.readings(model):
        wanted = sl.caa(model, PAIRS, layers=3)
        rows.clear()
        threads = [Thread(target=fit) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sl.caa(model, PAIRS)
        assert not rows
    assert len(found) == 3
    assert all(same(one, wanted) for one in found)


def test_a_sweep_reads_its_texts_once(counted):
    model, rows = counted
    items = sl.Pairs(POSITIVE[:1], NEGATIVE[:1], read="completion")
    options = {"damage": [], "progress": False, "prompts": [[3, 17, 25]]}

    def sweep(make):
        rows.clear()
        sl.sweep(model, make, sl.evaluate.propensity(items), layers=[1, 2, 3], strengths=[0.5, 1.0], **options)
        return len(rows)

    fitted = {layer: sl.caa(model, PAIRS, layers=layer) for layer in (1, 2, 3)}
    ready = sweep(lambda layer, s: fitted[layer] * s)
    assert sweep(lambda layer, s: sl.caa(model, PAIRS, layers=layer, strength=s)) == ready + 2
