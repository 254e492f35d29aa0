"""Several threads that linearise, fit, steer: the numbers of one thread, and nothing of the process changed."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch

import steerlens as sl
from steerlens.core import tensors_of
from steerlens.models import tiny
from steerlens.testing import Case, discover_hosts
from steerlens.testing.sequences import together

HOSTS = discover_hosts()
TEXTS = [[[seed + 1, seed + 7, seed + 20, seed + 3]] for seed in range(4)]


def switches():
    """What PyTorch keeps for the whole process."""
    cuda = torch.backends.cuda
    attention = (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled())
    level = torch.autograd.forward_ad._current_level
    return attention, level, torch.get_default_dtype(), torch.random.get_rng_state().tolist()


def assert_same(got, wanted, what):
    assert not isinstance(got, Exception), f"{what}: {got!r}"
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b), f"{what}: differs by {float((a.float() - b.float()).abs().max()):.2e}"


def jacobians(model, texts):
    return [sl.linearize(model, texts, progress=False).jacobians]


def fitted(case):
    return tensors_of([loop.parts for loop in case.fit().loops])


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_threads_that_linearise_a_model_each_give_the_serial_numbers(host, family):
    models = [tiny(family, host=host, seed=seed) for seed in range(4)]
    wanted = [jacobians(*pair) for pair in zip(models, TEXTS, strict=True)]
    before = switches()
    for _ in range(3):
        got = together(*(partial(jacobians, *pair) for pair in zip(models, TEXTS, strict=True)))
        for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
            assert_same(a, b, f"Jacobians of thread {index}")
    assert switches() == before


@pytest.mark.parametrize("host", HOSTS)
def test_attention_of_the_process_is_not_switched_while_a_thread_linearises(host):
    """Another thread's model, in the middle of a block's replay, runs the attention that it always runs."""
    model, other = tiny(host=host), tiny(host="hf", seed=1)[0]
    ids = torch.tensor([[3, 17, 25, 29]])
    seen, plain, before = [], other(ids).logits, switches()
    block = next(module for name, module in model.named_modules() if name.endswith("mlp"))

    def look(*_):
        if torch.is_grad_enabled():
            (result,) = together(lambda: (switches()[0], torch.equal(other(ids).logits, plain)))
            seen.append(result)

    handle = block.register_forward_hook(look)
    with torch.no_grad():
        sl.linearize(model, [[3, 17, 25]], progress=False)
    handle.remove()
    assert seen
    assert all(result == (before[0], True) for result in seen)


#: Activations, blocks, gradients of activations and of parameters, tangents.
METHODS = ["caa", "pid", "lqr", "sadi", "cold_kernel", "cold_fd"]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("method", METHODS)
def test_threads_that_fit_a_model_each_give_the_serial_numbers(method, host):
    if method.startswith("cold") and host == "hooked":
        pytest.skip("a HookedTransformer's parameters are not the model's")
    cases = [Case(method, host, model=tiny(host=host, seed=seed)) for seed in range(3)]
    wanted, before = [fitted(case) for case in cases], switches()
    for _ in range(2):
        for index, got in enumerate(together(*(partial(fitted, case) for case in cases))):
            assert_same(got, wanted[index], f"{method} of thread {index}")
    assert switches() == before


@pytest.mark.parametrize("host", [name for name in HOSTS if name != "hooked"])
def test_threads_that_steer_along_a_tangent_a_model_each_give_the_serial_numbers(host):
    """A process has one level of forward-mode differentiation."""
    cases = [Case("cold_fd", host, model=tiny(host=host, seed=seed)) for seed in range(3)]
    ids, before = torch.tensor([[3, 17, 25, 29]]), switches()

    def tokens(case):
        with case.steer(record=None):
            return [case.generate(ids, 4), case.logits(ids)]

    wanted = [tokens(case) for case in cases]
    for _ in range(3):
        for index, got in enumerate(together(*(partial(tokens, case) for case in cases))):
            assert_same(got, wanted[index], f"steered tokens of thread {index}")
    assert switches() == before


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("method", ["caa", "lqr", "sadi", "cold_fd"])
def test_threads_that_fit_on_one_model_give_the_serial_numbers(method, host):
    if method == "cold_fd" and host == "hooked":
        pytest.skip("a HookedTransformer's parameters are not the model's")
    model = tiny(host=host)
    cases = [Case(method, host, model=model) for _ in range(3)]
    data = [sl.Pairs([([5, 9], [12 + i]), ([8], [9, 41])], [([5, 9], [13 + i]), ([8], [10, 46])]) for i in range(3)]

    def fit(index):
        return tensors_of([loop.parts for loop in cases[index].fit(data[index]).loops])

    wanted = [fit(index) for index in range(3)]
    for _ in range(2):
        for index, got in enumerate(together(*(partial(fit, index) for index in range(3)))):
            assert_same(got, wanted[index], f"{method} of thread {index}")


# two threads that trace one model of nnsight get errors of nnsight's own, steered or not
@pytest.mark.parametrize("host", [name for name in HOSTS if name != "nnsight"])
@pytest.mark.parametrize("method", ["caa", "lqr"])
def test_threads_that_share_a_steered_model_get_its_numbers_or_one_sentence(method, host):
    case = Case(method, host, model=tiny(host=host))
    controller, seen = case.fit() * 3, Counter()
    ids = [torch.tensor([[3 + i, 17, 25 + i, 29, 41, 22, 46][: 4 + i % 3]]) for i in range(4)]
    sentences = set()
    with torch.no_grad(), case.steer(controller=controller, record=None):
        wanted = [case.logits(each) for each in ids]
        for _ in range(8):
            for got, expected in zip(together(*(partial(_logits, case, each) for each in ids)), wanted, strict=True):
                if isinstance(got, Exception):
                    sentences.add(str(got))
                else:
                    seen[torch.allclose(got, expected, atol=1e-4)] += 1
    assert not seen[False], f"{seen[False]} of {sum(seen.values())} wrong without a word"
    assert all("thread" in sentence for sentence in sentences), sentences
    assert len(sentences) <= 1


def _logits(case, ids):
    with torch.no_grad():
        return case.logits(ids)


@pytest.mark.parametrize("host", [name for name in HOSTS if name != "nnsight"])
def test_threads_that_generate_with_one_steered_model_get_its_tokens_or_one_sentence(host):
    case = Case("caa", host, model=tiny(host=host))
    case.controller = case.fit() * 3
    ids = [torch.tensor([[3 + i, 17, 25 + i, 29, 41, 22, 46][: 4 + i % 3]]) for i in range(3)]
    with case.steer(record=None):
        wanted = [case.generate(each, 4) for each in ids]
        for _ in range(3):
            results = together(*(partial(case.generate, each, 4) for each in ids))
            for got, expected in zip(results, wanted, strict=True):
                assert "thread" in str(got) if isinstance(got, Exception) else torch.equal(got, expected)
        for each, expected in zip(ids, wanted, strict=True):
            assert torch.equal(case.generate(each, 4), expected), "threads leave something changed"
