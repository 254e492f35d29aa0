"""Fields and flows: against autograd, against direct integration in all dimensions, and against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from steerlens.core import Now
from steerlens.flow.barriers import cosine_barrier, diagonal, exact_barrier, truncate
from steerlens.flow.fields import Polynomial, Quadratic
from steerlens.flow.flows import SOLVERS, Flow, angle, integrate
from steerlens.flow.sketch import Sketched, TensorSketch

D = 24
EXACT = {"rtol": 0, "atol": 1e-12}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def sides():
    return normal(9, D) + 0.7, 1.3 * normal(7, D, seed=1)


@pytest.fixture
def x():
    return 3 * normal(2, 5, D, seed=2)


def field_of(kind, sides):
    if kind == "fourier":
        return cosine_barrier(*sides, components=15, sigma="median")
    if kind.startswith("sketch"):
        sketch = TensorSketch.draw(D, components=63, degree=int(kind[-1]), gamma=0.5, coef0=0.5)
        return Sketched(sketch, normal(63, seed=3), normal(1, seed=4))
    if kind == "linear":
        return truncate(exact_barrier(*sides), 0)
    if kind == "truncated":
        return truncate(exact_barrier(*sides, gamma=1.0, coef0=0.1), 4)
    return exact_barrier(*sides, degree=int(kind), gamma=0.5, coef0=0.5)


KINDS = ["1", "2", "3", "4", "linear", "truncated", "fourier", "sketch of degree 1", "sketch of degree 3"]


def move(field, x, distance, **options):
    u, signals = Flow(field, distance, **options).act(x, Now())
    return x + u, {name: signal() for name, signal in signals.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_field_is_the_unit_gradient_of_its_barrier(kind, sides, x):
    field = field_of(kind, sides)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(field.value(leaf).sum(), leaf)
    torch.testing.assert_close(field.velocity(x), gradient / gradient.norm(dim=-1, keepdim=True), **EXACT)
    if field.spherical:
        assert (field.velocity(x) * x).sum(-1).abs().max() < 1e-12 * x.norm(dim=-1).max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", ["euler", "midpoint", "rk4", "rk4_38"])
def test_reduced_flow_is_the_flow_in_all_dimensions(kind, solver, sides, x):
    """The certificate: coordinates on the basis and one length beside it are enough (R3)."""
    field = field_of(kind, sides)
    direct = integrate(field.velocity, x, 1.7, steps=3, solver=solver)
    torch.testing.assert_close(move(field, x, 1.7, steps=3, solver=solver, radians=False)[0], direct, **EXACT)


@pytest.mark.parametrize("solver", ["euler", "midpoint", "rk4_38"])
@pytest.mark.parametrize("coef0", [0.0, 1.0])
def test_sketch_of_degree_two_is_a_diagonal_quadratic_form(solver, coef0, x):
    """The sketch's own features, differentiated by autograd, against its form (R1) in the rotated basis (R2)."""
    sketch = TensorSketch.draw(D, components=63, gamma=0.3, coef0=coef0, seed=3)
    weights = normal(63, seed=4)

    def height(y):
        flat = y.reshape(-1, D)
        return sketch.features(flat / flat.norm(dim=1, keepdim=True)) @ weights

    def velocity(y):
        leaf = y.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(height(leaf).sum(), leaf)
        return gradient / gradient.norm(dim=-1, keepdim=True)

    field = diagonal(*sketch.form(weights))
    torch.testing.assert_close(field.value(x).flatten(), height(x), **EXACT)
    direct = integrate(velocity, x, 1.1, steps=2, solver=solver)
    torch.testing.assert_close(move(field, x, 1.1, steps=2, solver=solver, radians=False)[0], direct, **EXACT)


def test_flow_in_dual_coordinates_is_the_same(sides, x):
    """R4: `x = a x0 + X'c`, with the Gram matrix of the points alone, for a kernel of degree 3."""
    field = field_of("3", sides)
    assert isinstance(field, Polynomial)
    points, start = field.points @ field.basis, x[0, 0]
    rows = torch.cat([start[None], points])
    gram = rows @ rows.T

    def pace(c):
        length = (c @ gram @ c).sqrt()
        kernel = field.gamma * (gram[1:] @ c) / length + field.coef0
        rise = torch.cat([torch.zeros(1, dtype=c.dtype), field.weights * 3 * field.gamma * kernel**2])
        slope = rise - (rise @ gram @ c) / length**2 * c
        return slope / (slope @ gram @ slope).sqrt()

    c = torch.zeros(len(rows), dtype=x.dtype)
    c[0] = 1
    dual = integrate(pace, c, 2.0, steps=4) @ rows
    torch.testing.assert_close(move(field, x, 2.0, steps=4, radians=False)[0][0, 0], dual, **EXACT)


def test_euler_leaves_the_sphere_by_a_known_amount(sides, x):
    """`|x_K|^2 = |x_0|^2 + T^2 / K`: each step is orthogonal to the state."""
    end = move(field_of("2", sides), x, 2.0, steps=5, solver="euler", radians=False)[0]
    torch.testing.assert_close(end.square().sum(-1), x.square().sum(-1) + 4 / 5, **EXACT)


@pytest.mark.parametrize("solver", ["geodesic", "circle"])
def test_great_circles_keep_the_norm(solver, sides, x):
    end, _ = move(field_of("linear", sides), x, 0.8, solver=solver)
    torch.testing.assert_close(end.norm(dim=-1), x.norm(dim=-1), **EXACT)


@pytest.mark.parametrize(
    ("solver", "order"), [("euler", 1), ("geodesic", 1), ("midpoint", 2), ("rk4", 4), ("rk4_38", 4)]
)
def test_order_of_convergence(solver, order, x):
    field = diagonal(torch.diag(normal(D)), normal(D, seed=5), torch.zeros((), dtype=torch.float64))
    best = move(field, x, 0.4, steps=400)[0]
    errors = [float((move(field, x, 0.4, steps=steps, solver=solver)[0] - best).norm()) for steps in (4, 8, 16)]
    measured = math.log2(errors[1] / errors[2])
    assert abs(measured - order) < 0.25, f"{solver}: errors {errors}, order {measured:.2f}"


def test_circle_is_the_limit_of_the_flow_and_stops_at_the_maximum(sides, x):
    field = field_of("linear", sides)
    torch.testing.assert_close(move(field, x, 0.7, solver="circle")[0], move(field, x, 0.7, steps=300)[0], **EXACT)
    end, signals = move(field, x, 5.0, solver="circle")
    top = field.basis[0] * field.linear.sign()
    torch.testing.assert_close(end, x.norm(dim=-1, keepdim=True) * top, **EXACT)
    assert signals["angle_rad"].max() < math.pi
    end, _ = move(field, x, -5.0, solver="circle")
    torch.testing.assert_close(end, -x.norm(dim=-1, keepdim=True) * top, **EXACT)


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_zero_distance_is_the_identity_and_a_negative_one_goes_down(solver, sides, x):
    field = field_of("2", sides)
    assert torch.equal(move(field, x, 0.0, solver=solver)[0], x)
    down = Quadratic(field.basis, -field.curvature, -field.linear, -field.constant)
    torch.testing.assert_close(move(field, x, -0.3, solver=solver)[0], move(down, x, 0.3, solver=solver)[0], **EXACT)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_row_may_have_its_own_distance(solver, sides, x):
    field = field_of("2", sides)
    z, _ = field.enter(x)
    lengths = torch.linspace(-1.0, 2.0, x[..., 0].numel(), dtype=x.dtype).reshape(*x.shape[:-1], 1)
    together = integrate(field.pace, z, lengths, steps=2, solver=solver)
    for row in range(len(x)):
        for column in range(x.shape[1]):
            alone = integrate(field.pace, z[row, column], float(lengths[row, column]), steps=2, solver=solver)
            torch.testing.assert_close(together[row, column], alone, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_barrier_rises_along_the_flow(kind, sides, x):
    signals = [move(field_of(kind, sides), x, 0.04 * step)[1] for step in range(8)]
    heights = torch.stack([signal["barrier_after"] for signal in signals])
    assert (heights.diff(dim=0) > 0).all()
    torch.testing.assert_close(heights[0], signals[-1]["barrier_before"])


def test_angle_signal_is_the_distance_in_radians(sides, x):
    """On a great circle exactly; in units of activation T / |x|."""
    field = field_of("linear", sides)
    signals = move(field, x, 0.3, solver="circle")[1]
    torch.testing.assert_close(signals["angle_rad"], torch.full_like(signals["angle_rad"], 0.3), **EXACT)
    end, signals = move(field, x, 0.5, solver="circle", radians=False)
    torch.testing.assert_close(signals["angle_rad"], 0.5 / x.norm(dim=-1), **EXACT)
    torch.testing.assert_close(angle(x, end), signals["angle_rad"], **EXACT)


def test_a_state_inside_the_basis_and_a_zero_state_are_finite(sides):
    field = field_of("2", sides)
    inside = 2 * field.basis[:3].sum(0)
    for state in (inside, torch.zeros_like(inside)):
        u, signals = Flow(field, 0.3).act(state[None, None], Now())
        assert torch.isfinite(u).all()
        assert all(torch.isfinite(value).all() for value in (signal() for signal in signals.values()))


def test_illegal_flows_are_refused(sides):
    field = field_of("2", sides)
    for options, words in (
        ({"solver": "rk5"}, "rk4_38"),
        ({"solver": "circle"}, "linear"),
        ({"steps": 0}, "from 1 to 1000"),
    ):
        with pytest.raises(ValueError, match=words):
            Flow(field, 0.3, **options)
    with pytest.raises(ValueError, match="keeps"):
        Flow(field_of("fourier", sides), 0.3, solver="geodesic")
