"""Jacobians of blocks, taken without gradients for the context or for a block's last matrix."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from steerlens.hosts import host_of
from steerlens.hosts.blocks import nominal
from steerlens.hosts.blocks.context import FixedContext, times
from steerlens.models import tiny
from steerlens.testing import peak


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_neither_shortcut_changes_a_jacobian(host, family, monkeypatch):
    if (family, host) == ("gemma", "hooked"):
        pytest.skip("HookedTransformer cannot build a small Gemma")
    path = host_of(tiny(family, host=host, dtype=torch.float64)).nominal([3, 17, 25, 29, 41])
    quick = [path.jacobian(t) for t in (0, 3)]
    monkeypatch.setattr(nominal, "FixedContext", nullcontext)
    eye = torch.eye(32, dtype=torch.float64)
    for t, A in zip((0, 3), quick, strict=True):
        torch.testing.assert_close(path.pull(t, eye), A, rtol=0, atol=1e-12)


def attention(q, k, v):
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


def grouped(q, k, v):
    k, v = (side[:, :, None].expand(1, 2, 1, 4, 3).reshape(1, 2, 4, 3) for side in (k, v))
    return attention(q, k, v)


def odd(q, k, v):
    return attention(q, k.cumsum(2).flip(2), torch.cat([v, 2 * v], dim=-1)) * k.mean() + k.T.sum()


def fused(q, k, v):
    mask = torch.tensor([[True, False, True, True]])
    return scaled_dot_product_attention(q, k, v, attn_mask=mask) + scaled_dot_product_attention(q, k, v, scale=0.3)


@pytest.mark.filterwarnings("ignore:The use of `x.T`")
@pytest.mark.parametrize("function", [attention, grouped, odd, fused])
def test_a_fixed_context_gives_the_same_values_and_gradients(function):
    generator = torch.Generator().manual_seed(0)
    past = [torch.randn(1, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2)]
    own = [torch.randn(1, 2, 1, 3, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    results = []
    for context in (FixedContext(), nullcontext()):
        with context:
            y = function(own[0], *(FixedContext.join(a, b, 2) for a, b in zip(past, own[1:], strict=True)))
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), own)])
    for quick, plain in zip(*results, strict=True):
        torch.testing.assert_close(quick, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("batched", ["left", "right", "both", "twice"])
def test_a_product_with_a_constant_is_batched_as_pytorch_batches_it(batched):
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(5, 2, 1, 3, generator=generator, dtype=torch.float64)
    right = torch.randn(5, 2, 3, 4, generator=generator, dtype=torch.float64)
    dims = {"left": (0, None), "right": (None, 0), "both": (0, 0), "twice": (0, None)}[batched]
    if batched == "twice":
        left = left[None] * torch.arange(1.0, 4.0, dtype=torch.float64).view(3, 1, 1, 1, 1)
    sides = [side if dim is not None else side[0] for side, dim in zip((left, right), dims, strict=True)]

    def mapped(function):
        once = torch.func.vmap(function, in_dims=dims)
        return (torch.func.vmap(once, in_dims=(0, None)) if batched == "twice" else once)(*sides)

    torch.testing.assert_close(mapped(times), mapped(torch.matmul), rtol=0, atol=1e-14)


def test_a_product_with_a_constant_has_two_derivatives():
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(2, 1, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    constant = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: times(x, constant), (left,), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: times(x, constant).square(), (left,))


def test_gradients_of_a_context_hold_no_copies_of_it():
    """A gradient takes less than half the numbers that the keys of a context of 400 tokens are."""
    path = host_of(tiny("llama", host="bridge")).nominal([3 + i % 40 for i in range(400)])
    rows = torch.eye(32)
    path.pull(0, rows)
    each = (peak(lambda: path.pull(0, rows[:16])) - peak(lambda: path.pull(0, rows[:1]))) / 15
    assert 0 < each < 4 * 400 * 32 / 2


@pytest.mark.parametrize("mask", [None, "bool", "float", "causal"])
@pytest.mark.parametrize("heads", [4, 2])
def test_attention_in_plain_operations_is_the_attention_of_torch(mask, heads):
    """Values and tangents, as under torch's own switch."""
    from torch.autograd import forward_ad
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from steerlens.hosts.blocks.attention import PlainAttention

    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(2, count, 5, 8, generator=generator) for count in (4, heads, heads)]
    tangents = [torch.randn(side.shape, generator=generator) for side in sides]
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    options = {"is_causal": mask == "causal", "enable_gqa": heads == 2}
    if mask in ("bool", "float"):
        options["attn_mask"] = seen if mask == "bool" else torch.where(seen, 0.0, -torch.inf)
    results = []
    for context in (sdpa_kernel(SDPBackend.MATH), PlainAttention()):
        with torch.no_grad(), context, forward_ad.dual_level():
            duals = [forward_ad.make_dual(*pair) for pair in zip(sides, tangents, strict=True)]
            out = torch.nn.functional.scaled_dot_product_attention(*duals, **options)
            results.append(forward_ad.unpack_dual(out))
    assert torch.equal(results[0].primal, results[1].primal)
    assert torch.equal(results[0].tangent, results[1].tangent)
