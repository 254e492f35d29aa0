"""The baselines: each against its authors' numbers or a closed form, and where they are known to go wrong."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from steerlens import Pairs
from steerlens.core import Now
from steerlens.fit.heads import head_accuracy, head_shift, scaled
from steerlens.laws.affine import Stretch
from steerlens.laws.rotation import Turn
from steerlens.methods.angular import plane
from steerlens.methods.linear_act import rank_regression
from steerlens.methods.mimic import transport
from steerlens.methods.repe import principal_difference
from steerlens.testing import Case
from tests.conftest import DATA


@pytest.fixture(scope="module")
def reference():
    return load_file(DATA / "odesteer.safetensors")


@pytest.fixture(scope="module")
def gauss(reference):
    return tuple(reference[f"gauss/{name}"].double() for name in ("pos", "neg", "x"))


@pytest.mark.parametrize("name", ["gauss", "smollm2"])
def test_repe_is_the_authors_component_turned_towards_the_mean(name, reference):
    positive, negative = (reference[f"{name}/{side}"].double() for side in ("pos", "neg"))
    n = min(len(positive), len(negative))
    v, _, cosine = principal_difference(positive[:n], negative[:n])
    expected = reference[f"{name}/float64/baselines/RepE/exact_top_pc"]
    torch.testing.assert_close(v * torch.sign(v @ expected), expected, rtol=0, atol=1e-7)
    assert v @ (positive[:n] - negative[:n]).mean(0) > 0
    assert cosine >= 0


def test_linear_act_is_the_authors_map(reference, gauss):
    positive, negative, x = gauss
    slope, shift = rank_regression(positive, negative)
    prefix = "gauss/float64/baselines/LinAcT"
    torch.testing.assert_close(slope, reference[f"{prefix}/w"], rtol=0, atol=1e-12)
    torch.testing.assert_close(shift, reference[f"{prefix}/b"], rtol=0, atol=1e-12)
    u, _ = Stretch(slope, shift).act(x, Now())
    torch.testing.assert_close(x + u, reference[f"{prefix}/ref_steered"], rtol=0, atol=1e-12)


def test_gated_mimic_is_the_authors_map(reference, gauss):
    positive, negative, x = gauss
    u, signals = transport(positive, negative, 1e-2, gate=True).act(x, Now())
    prefix = "gauss/float64/baselines/MiMiC"
    torch.testing.assert_close(signals["gate"](), 1 - reference[f"{prefix}/pred_X"].double())
    torch.testing.assert_close(x + u, reference[f"{prefix}/ref_steered"], rtol=0, atol=1e-7 * float(x.abs().max()))


def test_mimic_matches_mean_and_covariance(gauss):
    positive, negative, _ = gauss
    moved = negative + transport(positive, negative, 1e-9).act(negative, Now())[0]
    torch.testing.assert_close(moved.mean(0), positive.mean(0), rtol=0, atol=1e-10)
    torch.testing.assert_close(moved.T.cov(correction=0), positive.T.cov(correction=0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mimic_with_fewer_texts_than_dimensions_is_exact_on_their_span(dtype, reference):
    """Where the authors' code returns NaN; against the same formula on whole [d d] matrices."""
    positive, negative = (reference[f"smollm2/{side}"][:12, :96].to(dtype) for side in ("pos", "neg"))
    law = transport(positive, negative, 1e-2)
    assert law.basis.shape == (24, 96)
    u, _ = law.act(negative, Now())
    assert torch.isfinite(u).all()

    def root(matrix, power):
        values, vectors = torch.linalg.eigh(matrix)
        return (vectors * values**power) @ vectors.T

    wanted, given = (
        side.double().T.cov(correction=0) + 1e-2 * torch.eye(96, dtype=torch.float64) for side in (positive, negative)
    )
    half, inverse = root(given, 0.5), root(given, -0.5)
    A = inverse @ root(half @ wanted @ half, 0.5) @ inverse
    centre = negative.double().mean(0)
    whole = (negative.double() - centre) @ A + positive.double().mean(0)
    tolerance = 1e-7 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close((negative + u).double(), whole, rtol=0, atol=tolerance)


def test_iti_is_the_closed_form(reference):
    z, tuning, v = (reference[f"micro/iti/{name}"] for name in ("z", "tuning", "directions"))
    v = v / v.norm(dim=1, keepdim=True)
    sigma = reference["micro/iti/sigma_unbiased"]
    shift = torch.zeros_like(v)
    for head in (1, 3):
        shift[head] = scaled(v[head], tuning[:, head])
        torch.testing.assert_close(shift[head], sigma[head] * v[head], rtol=0, atol=1e-12)
    steered = z.clone()
    steered[:, -1] = z[:, -1] + 15.0 * shift
    torch.testing.assert_close(steered, reference["micro/iti/out_last_token"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("direction", ["mean", "probe"])
def test_iti_finds_the_head_that_knows(direction):
    generator = torch.Generator().manual_seed(0)
    positive, negative = (torch.randn(60, 5, 8, generator=generator) for _ in range(2))
    positive[:, 3, 2] += 6
    accuracy = head_accuracy(positive, negative, held_out=0.3, seed=0)
    assert int(accuracy.argmax()) == 3
    assert accuracy[3] > 0.9
    shift = head_shift(positive, negative, [3], direction=direction)
    assert shift[[0, 1, 2, 4]].abs().max() == 0
    assert int(shift[3].argmax()) == 2


def test_iti_acts_on_as_many_heads_as_asked_and_no_others():
    case = Case("iti", "bridge")
    controller = case.fit(n_elements=3)
    chosen = {tuple(pair) for pair in controller.recipe["found"]["heads"]}
    moved = {
        (loop.act.layer, head)
        for loop in controller.loops
        for head, row in enumerate(loop.law.vector)
        if row.abs().max() > 0
    }
    assert moved == chosen
    assert len(chosen) == 3
    with pytest.raises(ValueError, match="heads"):
        case.fit(n_elements=10_000)


@pytest.mark.parametrize("degrees", [0.0, 90.0, 200.0])
@pytest.mark.parametrize("adaptive", [False, True])
def test_angular_is_the_closed_form(degrees, adaptive, reference):
    h = reference["micro/angular/h"]
    first, second = (reference[f"micro/angular/{name}"] for name in ("first", "second"))
    # Q of QR up to signs: the second made orthogonal to the first
    axes = torch.linalg.qr(torch.stack([first, second]).T)[0].T
    axes = axes * torch.sign((axes * torch.stack([first, second])).sum(1, keepdim=True))
    u, signals = Turn(axes, math.radians(degrees), adaptive=adaptive).act(h, Now())
    torch.testing.assert_close(h + u, reference[f"micro/angular/out/{degrees}/{int(adaptive)}"], rtol=0, atol=1e-12)
    if not adaptive:
        torch.testing.assert_close((h + u).norm(dim=-1), h.norm(dim=-1), rtol=0, atol=1e-12)
        turned = Turn(axes, 0.0).act(h + u, Now())[1]["angle_rad"]()
        torch.testing.assert_close(torch.cos(turned), torch.full_like(turned, math.cos(math.radians(degrees))))
    assert ("gate" in signals) == adaptive


def test_angular_plane_is_orthonormal_and_needs_two_directions():
    rows = torch.randn(6, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = rows / rows.norm(dim=1, keepdim=True)
    first, second = plane(rows, 2)
    assert torch.equal(first, rows[2])
    torch.testing.assert_close(torch.stack([first @ second, second.norm()]), torch.tensor([0.0, 1.0]).double())
    with pytest.raises(ValueError, match="plane"):
        plane(rows[:1].expand(4, -1), 0)


@pytest.mark.parametrize("method", ["linear_act", "mimic", "mean_act"])
def test_strength_goes_that_far_along_the_transport(method):
    case = Case(method, "bridge")
    whole, half = case.fit(strength=1.0), case.fit(strength=0.5)
    x = torch.randn(1, 3, case.model.cfg.d_model, generator=torch.Generator().manual_seed(2))
    a, b = (side.loops[0].law.act(x, Now())[0] * side.loops[0].strength for side in (whole, half))
    torch.testing.assert_close(b, a / 2)


@pytest.mark.parametrize("method", ["repe", "cast"])
def test_a_relative_strength_is_a_share_of_the_states_norm(method):
    """The states are read with the library's own cache; the paper's vectors have unit length."""
    case = Case(method, "bridge")
    relative, paper = case.fit(strength=0.5), case.fit(paper=True)
    for one, other in zip(relative.loops, paper.loops, strict=True):
        norms = []
        for prompt, completion in (*case.data.positive, *case.data.negative):
            _, cache = case.model.run_with_cache(torch.tensor([[*prompt, *completion]]))
            norms.append(float(cache[str(one.act)][0, -1].norm()))
        size = float((one.law.vector * one.strength).norm())
        assert size == pytest.approx(0.5 * sum(norms) / len(norms), rel=1e-5)
        assert float((other.law.vector * other.strength).norm()) == pytest.approx(1.0, rel=1e-5)
        torch.testing.assert_close(one.law.vector / one.law.vector.norm(), other.law.vector)


def test_mimics_ridge_is_a_share_of_the_negative_texts_variance():
    case = Case("mimic", "bridge")
    (site,) = case.controller.sites
    states = []
    for prompt, completion in case.data.negative:
        _, cache = case.model.run_with_cache(torch.tensor([[*prompt, *completion]]))
        states.append(cache[str(site)][0, -1].double())
    variance = float(torch.stack(states).var(0, correction=0).mean())
    assert case.fit(ridge=0.7).recipe["found"]["ridge"] == [pytest.approx(0.7 * variance, rel=1e-5)]
    assert case.fit(paper=True).recipe["found"]["ridge"] == [0.01]
    x = torch.randn(1, 3, case.model.cfg.d_model, generator=torch.Generator().manual_seed(2))
    same = case.fit(ridge=0.7 * variance, scale="absolute").loops[0].law.act(x, Now())[0]
    torch.testing.assert_close(case.fit(ridge=0.7).loops[0].law.act(x, Now())[0], same, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("iti", {"held_out": 1.0}, "held_out"),
        ("iti", {"direction": "pca"}, "probe"),
        ("mimic", {"ridge": 0.0}, "ridge"),
        ("mimic", {"point": "z"}, "vector"),
        ("angular", {"layers": [99]}, "layer 99"),
    ],
)
def test_bad_arguments_are_refused(method, options, words):
    with pytest.raises(ValueError, match=words):
        Case(method, "bridge").fit(**options)


@pytest.mark.parametrize(("method", "words"), [("repe", "pairs"), ("mimic", "two texts"), ("linear_act", "two texts")])
def test_too_few_texts_are_refused(method, words):
    case = Case(method, "bridge")
    case.data = Pairs([[5, 9, 12]], [[5, 9, 13]])
    with pytest.raises(ValueError, match=words):
        case.fit()
