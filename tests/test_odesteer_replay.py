"""ODESteer, the rest of the authors' numbers: float32, degree 3, real activations, and the residual-level baselines.

Tolerances are those with which the numbers came: fields to 1e-12 in float64 and 1e-5 in float32, flows to 2e-7 and 5e-6
of their length. The authors' time grid is float32, and their gradient norm has an absolute epsilon of 1e-10.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from steerlens import Add, Flow
from steerlens.core import Now, map_tensors
from steerlens.fit.logistic import linear_probe
from steerlens.flow.barriers import _span, diagonal, exact_barrier, sketched_barrier
from steerlens.flow.fields import Cosines
from steerlens.flow.sketch import Sketched, TensorSketch
from steerlens.laws.affine import Stretch
from steerlens.methods.linear_act import rank_regression
from steerlens.methods.mimic import transport
from steerlens.methods.repe import principal_difference
from tests.conftest import DATA

POLY = {  # components, degree, gamma, coef0
    "poly_paper_n8000": (8000, 2, 0.1, 1.0),
    "poly_labels": (512, 2, 0.1, 1.0),
    "poly_deg3": (512, 3, 0.5, 0.5),
    "poly_deg2_nocoef0": (512, 2, 1.0, 0.0),
    "poly_classdefaults": (100, 2, 1.0, 0.1),
    "poly_deg1": (512, 1, 1.0, 0.0),
    "poly_odd_n511": (511, 2, 0.1, 1.0),
}
PRIOR = torch.tensor(150 / 200, dtype=torch.float64).log()


@pytest.fixture(scope="module")
def reference():
    return load_file(DATA / "odesteer.safetensors") | load_file(DATA / "baselines.safetensors")


@pytest.fixture(scope="module")
def gauss(reference):
    """Both sides, and every fourth of the points at which the authors steer."""
    sides = [reference[f"gauss/{name}"].double() for name in ("pos", "neg", "x")]
    return sides[0], sides[1], sides[2][::4]


def sketch_of(name, d=32):
    components, degree, gamma, coef0 = POLY[name]
    return TensorSketch.draw(d, components=components, degree=degree, gamma=gamma, coef0=coef0, seed=0)


def field_of(sketch, coef, constant):
    if len(sketch.buckets) > 2:
        return Sketched(sketch, coef, constant)
    A, b, k = sketch.form(coef)
    return diagonal(A, b, k + constant)


def replay(reference, prefix, field, x, tolerance):
    found = 0
    for key, expected in reference.items():
        if key.startswith(f"{prefix}/ref_steered/"):
            solver, steps, distance = key.rsplit("/", 1)[1].split(",")
            rule = "rk4_38" if solver == "rk4" else solver
            u, _ = Flow(field, float(distance), steps=int(steps), solver=rule, radians=False).act(x, Now())
            rows = x[: len(expected)] + u[: len(expected)]
            rounding = 2 * torch.finfo(x.dtype).eps * float(x.abs().max())
            assert (rows - expected).abs().max() < tolerance * float(distance) + rounding, key
            found += 1
    assert found, f"no flow of {prefix} was replayed"


def test_sketch_of_degree_three_is_the_authors(reference, gauss):
    positive, negative, x = gauss
    prefix, sketch = "gauss/float64/poly_deg3", sketch_of("poly_deg3")
    constant = reference[f"{prefix}/intercept"][0] + PRIOR
    field = Sketched(sketch, reference[f"{prefix}/coef"], constant)
    raw = reference[f"{prefix}/ref_raw_grad_batch"]
    torch.testing.assert_close(field.velocity(x), raw / raw.norm(dim=1, keepdim=True), rtol=0, atol=1e-12)
    expected = reference[f"{prefix}/ref_log_dre"]
    whole = reference["gauss/x"].double()
    torch.testing.assert_close(field.value(whole), expected, rtol=0, atol=1e-11)
    replay(reference, prefix, field, x, 2e-7)
    mine = sketched_barrier(positive, negative, sketch)
    assert torch.cosine_similarity(mine.velocity(x), field.velocity(x)).min() > 0.9999


def test_fit_from_labels_is_the_fit_from_two_sides(reference, gauss):
    """The authors' other signature; the same coefficients come out."""
    prefix, sketch = "gauss/float64/poly_labels", sketch_of("poly_labels")
    assert torch.equal(reference[f"{prefix}/intercept"], reference["gauss/float64/poly_paper_n512/intercept"])
    field = field_of(sketch, reference["gauss/float64/poly_paper_n512/coef"], reference[f"{prefix}/intercept"][0])
    replay(reference, prefix, field, gauss[2], 2e-7)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_one_step_variant_is_the_authors(dtype, reference, gauss):
    x = gauss[2].to(getattr(torch, dtype))
    coef = reference[f"gauss/{dtype}/poly_paper_n512/coef"].to(x.dtype)
    field = field_of(sketch_of("poly_labels"), coef, coef.new_zeros(()))
    for distance in (0.3, 8.0):
        u, _ = Flow(field, distance, steps=1, solver="euler", radians=False).act(x, Now())
        expected = reference[f"gauss/{dtype}/step_poly/ref_steered/{distance}"]
        assert (x + u - expected).abs().max() < (2e-7 if dtype == "float64" else 5e-6) * distance


@pytest.mark.parametrize("name", list(POLY))
def test_float32_is_the_authors(name, reference, gauss):
    prefix, x, sketch = f"gauss/float32/{name}", gauss[2].float(), sketch_of(name)
    coef = reference.get(f"{prefix}/coef")
    if coef is None:  # kept where the sketch can reach; the others' features are all zero
        coef = torch.zeros(sketch.components)
        reached = ((sketch.buckets[0][:, None] + sketch.buckets[1]) % sketch.components).unique()
        coef[reached] = reference[f"{prefix}/coef_used"]
    field = field_of(sketch, coef, reference[f"{prefix}/intercept"][0] + PRIOR.float())
    torch.testing.assert_close(field.velocity(x), reference[f"{prefix}/ref_field"], rtol=0, atol=1e-5)
    expected = reference[f"{prefix}/ref_log_dre"]
    torch.testing.assert_close(field.value(reference["gauss/x"].float()), expected, rtol=0, atol=1e-5)
    replay(reference, prefix, field, x, 5e-6)


@pytest.mark.parametrize("sigma", ["median", "scale", "3.0"])
def test_fourier_kernel_in_float32_is_the_authors(sigma, reference, gauss):
    prefix, x = f"gauss/float32/rff_{sigma}", gauss[2].float()
    draw = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
    width = float((draw[0] / reference[f"{prefix}/W_first"]).median())
    phases, weights, intercept = (reference[f"{prefix}/{name}"] for name in ("b", "coef", "intercept"))
    field = Cosines(*_span(draw / width), phases, weights, intercept)
    torch.testing.assert_close(field.velocity(x), reference[f"{prefix}/ref_field"], rtol=0, atol=1e-5)
    replay(reference, prefix, field, x, 5e-6)


def test_paper_mode_on_real_activations_is_the_authors(reference):
    prefix = "smollm2/float32/poly_paper_n8000"
    positive, negative, x = (reference[f"smollm2/{name}"] for name in ("pos", "neg", "x"))
    sketch = sketch_of("poly_paper_n8000", 576)
    field = field_of(sketch, reference[f"{prefix}/coef"], reference[f"{prefix}/intercept"][0])
    torch.testing.assert_close(field.velocity(x[:2]), reference[f"{prefix}/ref_field"], rtol=0, atol=1e-5)
    torch.testing.assert_close(field.value(x), reference[f"{prefix}/ref_log_dre"], rtol=0, atol=1e-5)
    replay(reference, prefix, field, x[:2], 5e-6)
    # sklearn in float32 stops 2 % from the optimum, in the same direction
    mine = map_tensors(sketched_barrier(positive, negative, sketch), lambda t: t.float())
    assert torch.cosine_similarity(mine.velocity(x), field.velocity(x)).min() > 0.999


@pytest.mark.parametrize(("name", "kernel"), [("extras_paper", (2, 0.1, 1.0)), ("extras_deg3", (3, 0.5, 0.5))])
def test_exact_kernel_followed_finely_and_on_great_circles(name, kernel, reference, gauss):
    positive, negative, x = gauss
    degree, gamma, coef0 = kernel
    field = exact_barrier(positive, negative, degree=degree, gamma=gamma, coef0=coef0)
    for key, solver, steps in (
        ("x_rk4_fine/8.0", "rk4_38", 200),
        ("x_geodesic/8.0,1", "geodesic", 1),
        ("x_geodesic/8.0,10", "geodesic", 10),
    ):
        u, _ = Flow(field, 8.0, steps=steps, solver=solver, radians=False).act(x, Now())
        torch.testing.assert_close(x + u, reference[f"gauss/{name}/{key}"], rtol=0, atol=2e-8)


def test_barrier_on_real_activations_is_that_of_an_independent_derivation(reference):
    positive, negative, x = (reference[f"smollm2/{name}"].double() for name in ("pos", "neg", "x"))
    torch.testing.assert_close(
        exact_barrier(positive, negative).value(x), reference["smollm2/extras_paper/x_value"], rtol=0, atol=1e-7
    )


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_residual_level_baselines_are_the_authors(dtype, reference, gauss):
    """Their ITI is a probe's unit weights in the residual stream; the method of that name here acts on heads."""
    kind = getattr(torch, dtype)
    positive, negative, x = (side.to(kind) for side in gauss)
    exact = 1e-12 if dtype == "float64" else 1e-5
    prefix = f"gauss/{dtype}/baselines"
    shift = positive.double().mean(0) - negative.double().mean(0)
    probe, _ = linear_probe(torch.cat([positive, negative]), torch.cat([torch.ones(200), torch.zeros(150)]))
    theirs = reference[f"{prefix}/ITI/vec"]
    # their regression stops at a gradient of 1e-4
    assert torch.cosine_similarity(probe.to(kind), theirs, dim=0) > 0.9999
    component, _, _ = principal_difference(positive[:150], negative[:150])
    component = component * torch.sign(component @ reference[f"{prefix}/RepE/vec"].double())
    for name, vector, tolerance in (
        ("CAA", shift, exact),
        ("RepE", component, max(exact, 1e-7)),
        ("ITI", theirs, exact),
    ):
        torch.testing.assert_close(vector.to(kind), reference[f"{prefix}/{name}/vec"], rtol=0, atol=tolerance)
        steered = x + 8.0 * Add(vector.to(kind)).act(x, Now())[0]
        torch.testing.assert_close(steered, reference[f"{prefix}/{name}/ref_steered/8.0"], rtol=0, atol=8 * tolerance)


def test_transports_in_float32_are_the_authors(reference, gauss):
    positive, negative, x = (side.float() for side in gauss)
    slope, shift = rank_regression(positive, negative)
    prefix = "gauss/float32/baselines/LinAcT"
    torch.testing.assert_close(slope.float(), reference[f"{prefix}/w"], rtol=0, atol=1e-5)
    torch.testing.assert_close(shift.float(), reference[f"{prefix}/b"], rtol=0, atol=1e-5)
    u, _ = Stretch(slope.float(), shift.float()).act(x, Now())
    torch.testing.assert_close(x + u, reference[f"{prefix}/ref_steered"], rtol=0, atol=1e-5 * float(x.abs().max()))
    prefix, whole = "gauss/float32/baselines/MiMiC", reference["gauss/x"].float()
    law = transport(positive, negative, 1e-2, gate=True)
    law = map_tensors(law, lambda t: t.float())
    torch.testing.assert_close(law.act(whole, Now())[1]["gate"](), 1 - reference[f"{prefix}/pred_X"].float())
    expected = reference[f"{prefix}/ref_steered"]
    torch.testing.assert_close(x + law.act(x, Now())[0], expected, rtol=0, atol=1e-5 * float(x.abs().max()))


def test_baselines_on_real_activations_are_the_authors(reference):
    positive, negative = (reference[f"smollm2/{side}"].double() for side in ("pos", "neg"))
    shift = positive.mean(0) - negative.mean(0)
    torch.testing.assert_close(shift.float(), reference["smollm2/float32/baselines/CAA/vec"], rtol=0, atol=1e-4)
    probe, _ = linear_probe(torch.cat([positive, negative]), torch.cat([torch.ones(64), torch.zeros(64)]))
    theirs = reference["smollm2/float64/baselines/ITI/vec"]
    assert torch.cosine_similarity(probe, theirs, dim=0) > 0.99  # theirs is 2 % from the optimum
