"""ODESteer: replay of the authors' numbers, the regression's optimum, and what the method promises on a model."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from steerlens import Flow, odesteer, shipped, steer
from steerlens.core import Now
from steerlens.fit.logistic import linear_probe, logistic
from steerlens.flow.barriers import (
    _span,
    cosine_barrier,
    diagonal,
    directions,
    exact_barrier,
    sketched_barrier,
    truncate,
)
from steerlens.flow.fields import Cosines
from steerlens.flow.sketch import TensorSketch
from steerlens.testing import Case
from tests.conftest import DATA

POLY = {  # components, degree, gamma, coef0
    "poly_paper_n512": (512, 2, 0.1, 1.0),
    "poly_paper_n8000": (8000, 2, 0.1, 1.0),
    "poly_deg2_nocoef0": (512, 2, 1.0, 0.0),
    "poly_classdefaults": (100, 2, 1.0, 0.1),
    "poly_deg1": (512, 1, 1.0, 0.0),
    "poly_odd_n511": (511, 2, 0.1, 1.0),
}


@pytest.fixture(scope="module")
def reference():
    return load_file(DATA / "odesteer.safetensors")


@pytest.fixture(scope="module")
def gauss(reference):
    return tuple(reference[f"gauss/{name}"].double() for name in ("pos", "neg", "x"))


def replayed(reference, prefix, field, x):
    """Largest difference from the authors' flows, relative to their length T."""
    worst = 0.0
    for key in reference:
        if key.startswith(f"{prefix}/ref_steered/"):
            solver, steps, distance = key.rsplit("/", 1)[1].split(",")
            flow = Flow(
                field,
                float(distance),
                steps=int(steps),
                solver="rk4_38" if solver == "rk4" else solver,
                radians=False,
            )
            worst = max(worst, float((x + flow.act(x, Now())[0] - reference[key]).abs().max()) / float(distance))
    assert worst > 0, "no flow was replayed"
    return worst


@pytest.mark.parametrize("name", list(POLY))
def test_paper_mode_replays_the_authors(name, reference, gauss):
    positive, negative, x = gauss
    components, degree, gamma, coef0 = POLY[name]
    prefix = f"gauss/float64/{name}"
    sketch = TensorSketch.draw(32, components=components, degree=degree, gamma=gamma, coef0=coef0, seed=0)
    assert torch.equal(sketch.buckets, reference[f"{prefix}/indexHash"].long())
    assert torch.equal(sketch.signs, reference[f"{prefix}/bitHash"].double())
    A, b, constant = sketch.form(reference[f"{prefix}/coef"])
    prior = torch.tensor(150 / 200, dtype=torch.float64).log()
    field = diagonal(A, b, constant + reference[f"{prefix}/intercept"][0] + prior)
    raw = reference[f"{prefix}/ref_raw_grad_batch"]
    torch.testing.assert_close(field.velocity(x), raw / raw.norm(dim=1, keepdim=True), rtol=0, atol=1e-12)
    torch.testing.assert_close(field.value(x), reference[f"{prefix}/ref_log_dre"], rtol=0, atol=1e-11)
    # their time grid is float32 and their gradient norm has an absolute epsilon
    assert replayed(reference, prefix, field, x) < 2e-7
    # their regression stops at a gradient of 1e-4; the optimum is a little further
    mine = sketched_barrier(positive, negative, sketch)
    assert torch.cosine_similarity(mine.velocity(x), field.velocity(x)).min() > 0.9999


def test_paper_mode_replays_the_authors_in_float32(reference, gauss):
    prefix, x = "gauss/float32/poly_paper_n512", gauss[2].float()
    sketch = TensorSketch.draw(32, components=512, gamma=0.1, coef0=1.0, seed=0)
    field = diagonal(*sketch.form(reference[f"{prefix}/coef"].float()))
    torch.testing.assert_close(field.velocity(x), reference[f"{prefix}/ref_field"], rtol=0, atol=1e-5)
    assert replayed(reference, prefix, field, x) < 5e-6


@pytest.mark.parametrize(("sigma", "tolerance"), [("scale", 2e-7), (3.0, 5e-7), ("median", 2e-7)])
def test_fourier_kernel_replays_the_authors(sigma, tolerance, reference, gauss):
    """At sigma 3 gradients are so small that the authors' epsilon of 1e-10 shows."""
    positive, negative, x = gauss
    prefix = f"gauss/float64/rff_{sigma}"
    W, phases, weights, intercept = (reference[f"{prefix}/{name}"] for name in ("W", "b", "coef", "intercept"))
    field = Cosines(*_span(W), phases, weights, intercept)
    assert replayed(reference, prefix, field, x) < tolerance
    mine = cosine_barrier(positive, negative, components=256, sigma=sigma, seed=0)
    torch.testing.assert_close(mine.phases, phases, rtol=0, atol=1e-12)
    # their median counts rounding errors on the diagonal of a distance matrix
    torch.testing.assert_close(mine.frequencies @ mine.basis, W, rtol=1e-3 if sigma == "median" else 1e-12, atol=0)


@pytest.mark.parametrize(("name", "kernel"), [("extras_paper", (2, 0.1, 1.0)), ("extras_deg3", (3, 0.5, 0.5))])
def test_exact_kernel_is_that_of_an_independent_derivation(name, kernel, reference, gauss):
    positive, negative, x = gauss
    degree, gamma, coef0 = kernel
    field = exact_barrier(positive, negative, degree=degree, gamma=gamma, coef0=coef0)
    prefix = f"gauss/{name}"
    prior = torch.tensor(150 / 200, dtype=torch.float64).log()
    torch.testing.assert_close(field.value(x) - prior, reference[f"{prefix}/x_value"], rtol=0, atol=1e-7)
    torch.testing.assert_close(field.velocity(x), reference[f"{prefix}/x_field"], rtol=0, atol=1e-9)
    for distance in ("2.0", "8.0"):
        for key, solver, steps in ((f"x_rk4/{distance}", "rk4_38", 10), (f"x_geodesic/{distance},3", "geodesic", 3)):
            u, _ = Flow(field, float(distance), steps=steps, solver=solver, radians=False).act(x, Now())
            torch.testing.assert_close(x + u, reference[f"{prefix}/{key}"], rtol=0, atol=2e-9 * float(distance))


def test_exact_kernel_on_real_activations_and_what_truncation_costs(reference):
    positive, negative, x = (reference[f"smollm2/{name}"].double() for name in ("pos", "neg", "x"))
    field = exact_barrier(positive, negative)
    expected = reference["smollm2/extras_paper/x_field"].double()  # kept in float32
    torch.testing.assert_close(field.velocity(x), expected, rtol=0, atol=1e-6)
    u, _ = Flow(field, 40.0, steps=200, solver="rk4", radians=False).act(x, Now())
    torch.testing.assert_close(x + u, reference["smollm2/extras_paper/x_rk4_fine/40.0"].double(), rtol=1e-6, atol=1e-4)
    u, _ = Flow(field, 0.3, steps=20).act(x, Now())
    for rank, degrees in ((0, 0.3), (2, 0.03), (8, 0.02)):
        cut = truncate(field, rank)
        v, _ = Flow(cut, 0.3, solver="circle" if cut.straight else "rk4", steps=1 if cut.straight else 20).act(x, Now())
        cosine = torch.cosine_similarity(x + u, x + v)
        assert torch.rad2deg(torch.arccos(cosine.clamp(max=1))).max() < degrees, f"rank {rank}"


def test_the_sketch_costs_what_its_docstring_says():
    """cos^2 = 1 / (1 + 1.2 d / n), within a third of the noise, over seeds."""
    generator = torch.Generator().manual_seed(0)
    d = 64
    shift = 0.5 * torch.randn(d, generator=generator, dtype=torch.float64)
    positive, negative, x = (torch.randn(60, d, generator=generator, dtype=torch.float64) for _ in range(3))
    exact = exact_barrier(positive + shift, negative).velocity(x)
    for n in (64, 512):
        squares = []
        for seed in range(6):
            sketch = TensorSketch.draw(d, components=n, seed=seed)
            field = sketched_barrier(positive + shift, negative, sketch)
            squares.append(torch.cosine_similarity(field.velocity(x), exact).square().mean())
        noise, law = 1 / float(torch.stack(squares).mean()) - 1, 1.2 * d / n
        assert law / 2 < noise < law * 2, f"n={n}: noise {noise:.3f}, law {law:.3f}"


@pytest.mark.parametrize("C", [0.1, 1.0, 100.0])
def test_regression_meets_its_optimality_conditions(C, gauss):
    positive, negative, _ = gauss
    u, labels = directions(positive, negative)
    kernel = (u @ u.T + 0.1) ** 2
    a, k = logistic(kernel, labels, C=C)
    torch.testing.assert_close(a, C * (labels - torch.sigmoid(kernel @ a + k)), rtol=0, atol=1e-9 * C)
    assert abs(float(a.sum())) < 1e-6 * C


def test_regression_is_that_of_scikit_learn(gauss):
    linear_model = pytest.importorskip("sklearn.linear_model")
    positive, negative, _ = gauss
    x = torch.cat([positive, negative])
    labels = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))])
    theirs = linear_model.LogisticRegression(C=1.0, tol=1e-12, max_iter=10000).fit(x.numpy(), labels.numpy())
    weights, intercept = linear_probe(x, labels)
    torch.testing.assert_close(weights, torch.from_numpy(theirs.coef_[0]), rtol=0, atol=1e-5)
    assert abs(float(intercept) - theirs.intercept_[0]) < 1e-5


def test_paper_mode_and_variants_steer_a_model():
    case = Case("odesteer", "bridge")
    ids = torch.tensor([[3, 17, 25, 29]])
    plain = case.logits(ids)
    for options in (
        {"mode": "paper", "distance": 1.0},
        {"kernel": "fourier", "distance": 1.0},
        {"solver": "euler", "steps": 1},
        {"rank": None},
        {"rank": 0},
        {"degree": 3},
        {"mode": "paper", "degree": 3, "distance": 1.0, "components": 256},
    ):
        controller = case.fit(**options)
        with steer(case.model, controller) as run:
            assert (case.logits(ids) - plain).abs().max() > 1e-4
            rise = run.record.stack("barrier_after") - run.record.stack("barrier_before")
            assert rise[..., -1].min() > 0, options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "paper"}, "distance"),
        ({"mode": "sketch"}, "exact"),
        ({"kernel": "rbf"}, "fourier"),
        ({"angle_rad": 0.1, "distance": 1.0}, "give one"),
        ({"degree": 0}, "degree"),
        ({"rank": -2}, "rank"),
        ({"point": "z"}, "vector"),
    ],
)
def test_bad_arguments_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Case("odesteer", "bridge").fit(**options)


@pytest.mark.real_model
def test_on_a_real_model_it_turns_by_the_angle_asked_and_leaves_position_0(smol):
    model = smol("bridge")
    controller = odesteer(model, shipped("sentiment")[:16], angle_rad=0.3)
    with steer(model, controller, where="all") as run:
        model(model.to_tokens("The film was a story about a family"))
        turned, before, after = (run.record.stack(name)[0] for name in ("angle_rad", "barrier_before", "barrier_after"))
    assert turned[:, 0].isnan().all()
    # one Runge-Kutta step of 0.3 rad is exact to 1e-4; its path bends a little on the sphere
    assert ((turned[:, 1:] - 0.3).abs() < 3e-3).all()
    assert (after[:, 1:] > before[:, 1:]).all()
    assert controller.recipe["found"]["truncation_rad"][0] < 0.02
