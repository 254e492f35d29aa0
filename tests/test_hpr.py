"""HPR: the rotation against its closed form, the fit against what it must find, and its errors."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from steerlens import Pairs, hpr, shipped, steer
from steerlens.core import Now
from steerlens.fit.logistic import linear_probe
from steerlens.flow.flows import angle
from steerlens.laws.rotation import PseudoRotation, predict_angle, rotate
from steerlens.methods.hpr import fit_angle, fit_probe, probe_score
from steerlens.testing import Case, snapshot
from tests.conftest import DATA


@pytest.fixture(scope="module")
def closed_form():
    values = load_file(DATA / "baselines.safetensors")
    return {name: values[f"micro/hpr/{name}"] for name in ("h", "w", "angle", "gamma2", "prob", "out")}


def constant_angle(d, turned, dtype=torch.float64):
    """A network that answers one angle whatever the state."""
    logit = math.log(turned / (math.pi - turned))
    return [torch.zeros(1, d, dtype=dtype)], [torch.tensor([logit], dtype=dtype)]


def network(d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    widths = (d, 6, 4, 2, 1)
    draw = [torch.randn(b, a, generator=generator).double() for a, b in pairwise(widths)]
    return draw, [torch.randn(b, generator=generator).double() for b in widths[1:]]


def test_rotation_is_the_closed_form(closed_form):
    h, w, turned = closed_form["h"], closed_form["w"], closed_form["angle"][..., 0]
    wrong = (torch.sigmoid(h @ w).round() == 0).double()
    torch.testing.assert_close(torch.sigmoid(h @ w), closed_form["prob"], rtol=0, atol=1e-14)
    out = h + wrong[..., None] * rotate(h, w, turned)
    assert 0 < wrong.sum() < wrong.numel()
    torch.testing.assert_close(out, closed_form["out"], rtol=0, atol=1e-12)


def test_law_is_the_authors_formula():
    """With the mirror image and a network, as they write it."""
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1)).double()
    w = torch.randn(16, generator=torch.Generator().manual_seed(2)).double()
    weights, biases = network(16)
    law = PseudoRotation(w, weights, biases, alpha=0.7)
    u, signals = law.act(x, Now())
    f = x
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        f = f @ weight.T + bias
        f = f * 0.5 * (1 + torch.erf(f / math.sqrt(2)))
    g1 = 0.7 * math.pi / (1 + torch.exp(-(f @ weights[-1].T + biases[-1])))
    mirrored = x - 2 * (x @ w / (w @ w))[..., None] * w
    g2 = torch.arccos(torch.cosine_similarity(x, mirrored, dim=-1))[..., None]
    expected = (torch.sin(g1) * mirrored + torch.sin(g2 - g1) * x) / torch.sin(g2)
    expected = torch.where((x @ w > 0)[..., None], x, expected)
    torch.testing.assert_close(x + u, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(signals["gate"](), (x @ w <= 0).double())
    torch.testing.assert_close(signals["angle_rad"](), g1[..., 0] * signals["gate"]())
    torch.testing.assert_close((x + u).norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)
    torch.testing.assert_close(angle(x, x + u), signals["angle_rad"](), rtol=0, atol=1e-7)


@pytest.mark.parametrize("distance", [0.0, 1e-300, 1e-12, 1e-6])
def test_near_the_hyperplane_the_rotation_is_finite_and_exact(distance):
    """Where the authors' quotient loses all digits: sin(gamma2) -> 0."""
    w = torch.tensor([1.0, 0.0, 0.0]).double()
    x = torch.tensor([[[-distance, 3.0, 0.0]]]).double()
    law = PseudoRotation(w, *constant_angle(3, 0.5))
    u, signals = law.act(x, Now())
    assert float(signals["gate"]()) == 1
    expected = 3 * torch.tensor([math.sin(0.5), math.cos(0.5), 0.0], dtype=torch.float64)
    torch.testing.assert_close((x + u)[0, 0], expected, rtol=0, atol=2 * distance + 1e-14)


def test_beyond_the_mirror_image_it_turns_on():
    w = torch.tensor([1.0, 0.0]).double()
    # the mirror image is 0.2 away
    x = 2 * torch.tensor([[[-math.sin(0.1), math.cos(0.1)]]], dtype=torch.float64)
    u, _ = PseudoRotation(w, *constant_angle(2, 1.0)).act(x, Now())
    torch.testing.assert_close((x + u)[0, 0], 2 * torch.tensor([math.sin(0.9), math.cos(0.9)], dtype=torch.float64))


def test_a_zero_state_and_one_along_the_probe_are_finite():
    w = torch.tensor([1.0, 0.0, 0.0]).double()
    x = torch.tensor([[[0.0, 0.0, 0.0], [-2.0, 0.0, 0.0]]]).double().requires_grad_()
    u, _ = PseudoRotation(w, *constant_angle(3, 0.5)).act(x, Now())
    assert torch.isfinite(u).all()
    assert u[0, 0].abs().max() < 1e-14
    assert torch.isfinite(torch.autograd.grad(u.sum(), x)[0]).all()


def test_probe_without_intercept_is_that_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    generator = torch.Generator().manual_seed(0)
    positive, negative = (torch.randn(n, 12, generator=generator).double() for n in (40, 30))
    x, labels = torch.cat([positive + 0.3, negative]), torch.cat([torch.ones(40), torch.zeros(30)])
    theirs = linear_model.LogisticRegression(C=0.5, fit_intercept=False, tol=1e-12, max_iter=10000)
    theirs.fit(x.numpy(), labels.numpy())
    weights, intercept = linear_probe(x, labels, C=0.5, intercept=False)
    torch.testing.assert_close(weights, torch.from_numpy(theirs.coef_[0]), rtol=0, atol=1e-6)
    assert float(intercept) == 0
    # its direction does not depend on the unit of the activations
    a, b = fit_probe(positive, negative), fit_probe(100 * positive, 100 * negative)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_network_learns_the_angle_and_zero_at_positive_states():
    generator = torch.Generator().manual_seed(0)
    positive = 50 * torch.randn(64, 24, generator=generator)
    axis = 50 * 4.9 * torch.eye(24)[0]
    positive = positive * (1 - torch.eye(24)[0]) + axis
    negative = positive - 2 * axis
    weights, biases, error = fit_angle(positive, negative, steps=400, rate=2e-3)
    assert [list(weight.shape) for weight in weights] == [[12, 24], [6, 12], [3, 6], [1, 3]]
    target = angle(negative, positive).double()
    assert float((predict_angle(negative.double(), weights, biases) - target).abs().mean()) < 0.1
    assert float(predict_angle(positive.double(), weights, biases).mean()) < 0.1
    assert error < 0.15
    again = fit_angle(positive, negative, steps=400, rate=2e-3)[0]
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
    other, first = (fit_angle(positive, negative, steps=1, seed=seed)[0][0] for seed in (1, 0))
    assert not torch.equal(other, first)


def test_layers_are_chosen_by_held_out_accuracy():
    generator = torch.Generator().manual_seed(0)
    positive, negative = (torch.randn(40, 8, generator=generator) for _ in range(2))
    noise = probe_score(positive, negative, held_out=0.25, seed=0)
    clear = probe_score(positive + 3, negative - 3, held_out=0.25, seed=0)
    assert clear[0] == 1.0 > noise[0]
    assert probe_score(positive, positive, held_out=0.25, seed=0) == (0.0, 0.0)


def test_fitting_leaves_the_global_random_state_alone(device):
    case = Case("hpr", "bridge", device=device)
    state = torch.get_rng_state()
    assert len(case.fit(n_layers=2).loops) == 2
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "never trained"),
        ({"n_layers": 0}, "one layer"),
        ({"batch": 0}, "one pair"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"rate": 0.0}, "rate=0.0"),
        ({"held_out": 1.0}, "held_out"),
        ({"layers": 99}, "no layer 99"),
    ],
)
def test_bad_arguments_are_refused_before_the_model_runs(options, words, device):
    case = Case("hpr", "bridge", device=device)
    case.model.forward = None  # a forward pass would fail
    with pytest.raises(ValueError, match=words):
        case.fit(**options)


def test_an_untrained_network_is_refused():
    with pytest.raises(ValueError, match="train it first"):
        PseudoRotation(torch.ones(4), [], [])
    with pytest.raises(ValueError, match="does not map a state of 4"):
        PseudoRotation(torch.ones(4), *constant_angle(5, 1.0))


def test_unpaired_texts_one_pair_and_equal_texts_are_refused(device):
    case = Case("hpr", "bridge", device=device)
    for data, words in (
        (Pairs([[5, 9]], [[5, 8], [5, 7]]), "hpr needs pairs"),
        (Pairs([[5, 9]], [[5, 8]]), "two pairs"),
        (Pairs([[5, 9], [6, 9]], [[5, 9], [6, 9]]), "identical activations"),
    ):
        with pytest.raises(ValueError, match=words):
            hpr(case.model, data)


@pytest.mark.real_model
def test_on_a_real_model_it_keeps_norms_and_turns_only_states_on_the_wrong_side(smol):
    model = smol("bridge")
    model(torch.tensor([[5]]))  # the bridge completes itself in its first pass
    before = snapshot(model)
    controller = hpr(model, shipped("sentiment")[:16], layers=range(10, 20), n_layers=2, steps=60)
    assert snapshot(model) == before
    with steer(model, controller, where="all", record="all") as run:
        ids = model.to_tokens("The film was dull and the food was cold, but I liked the music")
        _, cache = model.run_with_cache(ids)
    site = controller.sites[0]
    u, gate = (run.record[f"blocks.{site.layer}.hook_steer_{name}"][0, 1:] for name in ("u", "gate"))
    x = cache[str(site)][0, 1:]
    torch.testing.assert_close(x.norm(dim=-1), (x - u).norm(dim=-1), rtol=1e-4, atol=0)
    assert (u.norm(dim=-1)[gate == 0] == 0).all()
    assert controller.recipe["found"]["accuracy"][0] > 0.5
