"""A trained vector against plain PyTorch: hooks and autograd on the Hugging Face model, which know nothing of hosts."""

from __future__ import annotations

import pytest
import torch

import steerlens as sl
from steerlens.fit.objectives import Preference, labelled, objective
from steerlens.fit.training import Training
from steerlens.hosts import host_of
from steerlens.models import tiny
from steerlens.testing import Case, discover_hosts
from steerlens.testing.case import NEGATIVE, POSITIVE

PAIRS = sl.Pairs(POSITIVE, NEGATIVE)
LAYER = 2


def levels_of(model, v, indices):
    """Log probabilities of the labels of some pairs, one text at a time, with v added after a block, `[label]` each."""
    found = []
    for index in indices:
        levels = []
        for prompt, completion in (POSITIVE[index], NEGATIVE[index]):
            ids, start = torch.tensor([[*prompt, *completion]]), len(prompt)

            def hook(_, args, output, start=start):
                x = output if isinstance(output, torch.Tensor) else output[0]
                mask = (torch.arange(x.shape[1]) >= start - 1)[:, None]
                x = x + mask * v
                return x if isinstance(output, torch.Tensor) else (x, *output[1:])

            handle = model.model.layers[LAYER].register_forward_hook(hook)
            try:
                logits = model(ids).logits[0]
            finally:
                handle.remove()
            picked = logits[start - 1 : -1].log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])
            levels.append(picked[:, 0])
        found.append(levels)
    return found


def losses(model, v, indices, *, beta=1.0):
    """dpo losses."""
    found = [a.mean() - b.mean() for a, b in levels_of(model, v, indices)]
    return -torch.nn.functional.logsigmoid(beta * torch.stack(found))


def preferences(model, v, indices):
    """Losses of reference-free preference steering, written out."""
    found = []
    plain, forth, back = (levels_of(model, sign * v, indices) for sign in (0, 1, -1))
    for (p, q), (a, b), (c, d) in zip(plain, forth, back, strict=True):
        margin = float((q.sum() - p.sum()).detach())
        assert abs(margin) > 1, "the weights differ"
        weights = max(margin, 1.0), max(-margin, 1.0)
        wanted, unwanted = weights[0] * a.mean() - b.mean(), weights[1] * d.mean() - c.mean()
        found.append((1 + (-wanted).exp()).log() + (1 + (-unwanted).exp()).log())
    return torch.stack(found)


@pytest.fixture
def training(host):
    model = host_of(Case("caa", host).model)
    aim = objective("dpo", beta=1.0, reference=None)
    texts = labelled(PAIRS, model, aim.sides)
    return Training(model, texts, aim, [sl.Site(LAYER)], [2.0], rate=0.1, batch=2)


@pytest.mark.parametrize("loss", [losses, preferences])
def test_losses_and_their_gradient_are_those_of_plain_hooks(training, loss):
    training.aim = Preference() if loss is preferences else training.aim
    model, v = tiny("llama", host="hf")[0], torch.linspace(-1, 1, 32)[: training.host.d_model].requires_grad_()
    every = range(len(POSITIVE))
    mine, theirs = training.losses([v], list(every)), loss(model, v, every)
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    (a,), (b,) = torch.autograd.grad(mine.sum(), [v]), torch.autograd.grad(theirs.sum(), [v])
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_what_is_kept_is_the_best_seen_and_better_than_the_steepest_direction(host):
    case = Case("trained_vector", host)
    before = {name: value.clone() for name, value in host_of(case.model).block.named_parameters()}
    fitted = case.fit(layers=LAYER, length=0.5, steps=40)
    again = case.fit(layers=LAYER, length=0.5, steps=40)
    v = fitted.loops[0].law.vector
    assert torch.equal(v, again.loops[0].law.vector), "a seed gives one vector"
    found = fitted.recipe["found"]
    model, count = tiny("llama", host="hf")[0], len(POSITIVE)
    held = sorted(
        torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()[: max(round(count / 4), 1)]
    )
    for vector, loss in ((torch.zeros_like(v), found["before"]), (v, found["after"])):
        with torch.no_grad():
            assert float(losses(model, vector, held).mean()) == pytest.approx(loss, rel=1e-4)
    every = range(count)
    with torch.no_grad():
        assert losses(model, v, every).mean() < losses(model, torch.zeros_like(v), every).mean()
    parameters = dict(host_of(case.model).block.named_parameters())
    assert all(torch.equal(before[name], parameters[name]) and parameters[name].grad is None for name in before)


def test_training_finds_the_minimum_on_a_sphere():
    """Enough steps on all pairs: the gradient is along v, as at any minimum among vectors of one length."""
    case = Case("trained_vector", discover_hosts()[0])
    fitted = case.fit(layers=LAYER, length=0.3, steps=400, rate=0.03, batch=99, held_out=0.01)
    v = fitted.loops[0].law.vector.clone().requires_grad_()
    count = len(POSITIVE)
    held = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()[:1]
    train = [index for index in range(count) if index not in held]
    (slope,) = torch.autograd.grad(losses(tiny("llama", host="hf")[0], v, train).mean(), [v])
    start = case.fit(layers=LAYER, length=0.3, steps=1, rate=1e-9, batch=99, held_out=0.01).loops[0].law.vector
    begun = start.clone().requires_grad_()
    (early,) = torch.autograd.grad(losses(tiny("llama", host="hf")[0], begun, train).mean(), [begun])

    def across(g, x):
        return float((g - (g @ x) / (x @ x) * x).norm() / g.norm())

    assert across(slope, v.detach()) < across(early, start)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length": 0.0}, "length=0.0; it must be a positive number"),
        ({"rate": float("inf")}, "rate=inf; it must be"),
        ({"held_out": 1.0}, "held_out=1.0; it is a share of the pairs"),
        ({"point": "z"}, "no point 'z'"),
        ({"loss": "reps"}, "loss='reps'; it is one of dpo, negative_sft, sft, preference"),
    ],
)
def test_mistakes(options, words):
    with pytest.raises(ValueError, match=words):
        Case("trained_vector", discover_hosts()[0]).fit(**options)


def test_one_pair_and_a_steered_model_are_refused():
    case = Case("trained_vector", discover_hosts()[0])
    with pytest.raises(ValueError, match="needs two pairs"):
        case.fit(data=sl.Pairs(POSITIVE[:1], NEGATIVE[:1]))
    with sl.steer(case.model, case.controller), pytest.raises(ValueError, match="remove the run that steers it first"):
        case.fit()
