"""Setpoints against their closed forms and reference numbers, and with every method that can use them."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import DATA
from safetensors.torch import load_file

import steerlens as sl
from steerlens.control import targets
from steerlens.core import Now
from steerlens.testing import Case, checks, discover_hosts


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(*shape, seed=0):
    rows = randn(*shape, seed=seed)
    return rows / rows.norm(dim=-1, keepdim=True)


X = 3 * randn(2, 5, 8, seed=9)
V = unit(3, 8, seed=1)
LEVELS = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
PLANE = torch.linalg.qr(randn(8, 2, seed=2))[0].T
ALL = {
    "level": sl.Level(V[0], 1.0),
    "joint": sl.Joint(V, LEVELS),
    "independent": sl.Independent(V, LEVELS),
    "angle": sl.Angle(PLANE, 2.0),
    "point": sl.Point(randn(8, seed=3)),
}


@pytest.mark.parametrize("name", ALL)
def test_error_is_the_coordinates_on_the_basis_and_its_signal_the_norm(name):
    setpoint = ALL[name]
    c, signals = setpoint.measure(X)
    e = setpoint.error(X)
    torch.testing.assert_close(e, c @ setpoint.basis)
    torch.testing.assert_close(signals["error"](), e.norm(dim=-1))
    assert set(signals) == set(setpoint.signals)
    assert all(value().shape[:2] == X.shape[:2] for value in signals.values())


def test_joint_reaches_all_levels_by_the_shortest_way():
    e = ALL["joint"].error(X)
    torch.testing.assert_close((X + e) @ V.T, LEVELS.expand(2, 5, 3))
    shortest = torch.linalg.lstsq(V, (LEVELS - X @ V.T).reshape(-1, 3).T, driver="gelsd").solution.T.view(X.shape)
    torch.testing.assert_close(e, shortest)


def test_independent_is_the_sum_of_single_levels():
    single = sum(sl.Level(v, float(level)).error(X) for v, level in zip(V, LEVELS, strict=True))
    torch.testing.assert_close(ALL["independent"].error(X), single)
    orthonormal = torch.linalg.qr(V.T)[0].T
    torch.testing.assert_close(sl.Joint(orthonormal, LEVELS).error(X), sl.Independent(orthonormal, LEVELS).error(X))


def test_joint_of_equal_directions_meets_their_levels_in_the_middle():
    e = sl.Joint(torch.stack([V[0], V[0]]), torch.tensor([1.0, 2.0])).error(X)
    torch.testing.assert_close((X + e) @ V[0], torch.full((2, 5), 1.5, dtype=torch.float64))


@pytest.mark.parametrize("angle_rad", [0.0, 0.3, 2.0, math.pi, -1.0])
def test_angle_is_reached_with_the_length_kept(angle_rad):
    reached = X + sl.Angle(PLANE, angle_rad).error(X)
    before, after = X @ PLANE.T, reached @ PLANE.T
    torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1))
    expected = torch.tensor([math.cos(angle_rad), math.sin(angle_rad)], dtype=torch.float64)
    torch.testing.assert_close(after / after.norm(dim=-1, keepdim=True), expected.expand_as(after))
    torch.testing.assert_close(reached - after @ PLANE, X - before @ PLANE)
    angle = sl.Angle(PLANE, angle_rad).measure(X)[1]["angle_rad"]()
    torch.testing.assert_close(torch.stack([angle.cos(), angle.sin()], -1) * before.norm(dim=-1, keepdim=True), before)


@pytest.mark.parametrize(
    "setpoint",
    [
        sl.Level(torch.zeros(8), 0.0),
        sl.Joint(torch.zeros(2, 8), torch.zeros(2)),
        sl.Independent(torch.zeros(2, 8), torch.zeros(2)),
        sl.Angle(torch.zeros(2, 8), 1.0),
    ],
    ids=lambda setpoint: type(setpoint).__name__,
)
def test_a_zero_direction_asks_for_nothing_and_has_finite_gradients(setpoint):
    x = X.float().requires_grad_()
    e = setpoint.error(x)
    assert not e.any()
    (gradient,) = torch.autograd.grad(e.sum(), x)
    assert torch.isfinite(gradient).all()


def test_second_direction_of_the_angular_plane_is_the_principal_component(oracle, control):
    v = oracle["V"].double()  # stored in float32
    v = v / torch.where(v.any(-1), v.norm(dim=-1), 1.0)[:, None]
    planes = targets.planes(v * oracle["mu"][:, None], v)
    assert not planes[0].any(), "all texts end in the same token: there is no plane at layer 0"
    b1, b2 = planes[1:].unbind(1)
    torch.testing.assert_close(b1, v[1:])
    component = control["angular_basis2"].double()
    expected = component - (b1 @ component)[:, None] * b1
    expected = expected / expected.norm(dim=-1, keepdim=True)
    torch.testing.assert_close((b2 * expected).sum(-1).abs(), torch.ones(30, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close((b1 * b2).sum(-1), torch.zeros(30, dtype=torch.float64), rtol=0, atol=1e-12)


# -- with every method --------------------------------------------------------------------------------------------

OTHER = sl.Pairs([[5, 9, 3, 12], [8, 2, 44]], [[5, 9, 3, 20], [8, 2, 17]])
VARIANTS = {
    "lqr-angular": ("lqr", {"setpoint": "angular", "angle_rad": 0.5}, False),
    "lqr-joint": ("lqr", {"level": [1.0, 0.5]}, True),
    "lqr-output": ("lqr", {"solver": "output"}, False),
    "lqr-output-joint": ("lqr", {"solver": "output", "layers": [1, 3]}, True),
    "lqr-preview": ("lqr", {"solver": "output", "preview": True}, False),
    "lqr-preview-joint": ("lqr", {"solver": "output", "preview": True, "origin": "negative"}, True),
    "lqr-scalar-angular": ("lqr", {"solver": "scalar", "setpoint": "angular"}, False),
    "pid-angular": ("pid", {"setpoint": "angular", "angle_rad": 1.5}, False),
    "pid-independent": ("pid", {"combine": "independent", "ki": 0.2, "reset_every": 3}, True),
    "pid-proportional": ("pid", {"kp": 0.5, "ki": 0, "kd": 0}, False),
    "track-output": ("track", {"solver": "output", "layers": [0, 2, 3]}, False),
}
CHECKED = (
    "saves_and_loads",
    "cache_on_equals_off",
    "batch_row_equals_row_alone",
    "dtype_is_kept",
    "signals_are_recorded",
    "gradients_flow",
    "same_seed_same_controller",
)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("host", discover_hosts())
def test_promises_hold_with_every_setpoint_and_solver(host, variant, tiny_model, device):
    method, options, several = VARIANTS[variant]
    case = Case(method, host, device=device, model=tiny_model(host))
    if several:
        case.data = [case.data, OTHER]
    fit = case.fit
    case.fit = lambda: fit(**options)
    for check in checks():
        if check.__name__.removeprefix("check_") in CHECKED:
            check(case)


def test_two_equal_concepts_are_one_when_joint_and_twice_when_independent(tiny_model):
    model = tiny_model(discover_hosts()[0])
    data = Case("lqr", "bridge", options={"paper": True}).data
    one = sl.lqr(model, data, progress=False, paper=True)
    plant = {"linearize_on": 4, "progress": False}
    joint = sl.lqr(model, [data, data], **plant, paper=True)
    twice = sl.lqr(model, [data, data], combine="independent", **plant, paper=True)
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(4))
    for single, both, double in zip(one.loops, joint.loops, twice.loops, strict=True):
        u = single.law.act(x, Now())[0]
        torch.testing.assert_close(both.law.act(x, Now())[0], u, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(double.law.act(x, Now())[0], 2 * u, rtol=1e-4, atol=1e-5)
    assert isinstance(twice.recipe["data"], list)
    assert twice.recipe["arguments"]["combine"] == "independent"


# -- against the authors' rules -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def control():
    return load_file(DATA / "control.safetensors")


@pytest.fixture(scope="session")
def fitted(smol, texts, control):
    """Fitted once, on the first host: test_lqr_reference proves that fits on all hosts agree."""
    model = smol(discover_hosts()[0])
    data = sl.Pairs(texts["texts_pos"], texts["texts_neg"])
    plant = sl.linearize(model, data.positive[:1], progress=False)
    options = {"linearization": plant, "progress": False}
    return {
        "full": sl.lqr(model, data, full_gain=True, **options, paper=True),
        "angular": sl.lqr(model, data, setpoint="angular", **options, paper=True),
        "track": sl.track(model, control["tracking/nominal_ids"][0], progress=False),
    }


@pytest.fixture(scope="module")
def real(host, smol, device):
    return Case("lqr", host, device=device, model=smol(host), options={"paper": True})


def last(case, ids, controller, **options):
    with case.steer(controller=controller, record="all", **options) as run, torch.no_grad():
        logits = case.logits(ids)[0, -1, ::8]
    return logits.float().cpu(), run.record


@pytest.mark.real_model
@pytest.mark.parametrize("degrees", [0, 180])
def test_angular_setpoint(real, fitted, oracle, control, degrees):
    controller = fitted["angular"]
    if degrees:  # the gains do not depend on the angle
        turned = [sl.Angle(loop.law.setpoint.basis, math.radians(degrees)) for loop in controller.loops]
        laws = [sl.Feedback(angle, loop.law.gains) for angle, loop in zip(turned, controller.loops, strict=True)]
        loops = [loop.replace(law=law) for law, loop in zip(laws, controller.loops, strict=True)]
        controller = sl.Controller(loops, controller.recipe)
    logits, _ = last(real, oracle["prompt_ids"], controller, where=slice(0, None))
    assert (logits - control[f"steered/angular/all/deg{degrees}/logits/every8"]).abs().max() < 1e-3


@pytest.mark.real_model
def test_two_independent_concepts(real, fitted, oracle, control):
    loops = []
    for loop in fitted["full"].loops:
        t = loop.act.layer
        mu = torch.stack([oracle["mu"][t].float(), control["E_alt"][t].norm()])
        directions = torch.stack([oracle["V"][t].float(), control["E_alt"][t] / mu[1]])
        setpoint = sl.Independent(directions, mu * torch.tensor([1, 1.5]))
        loops.append(loop.replace(law=sl.Feedback(setpoint, directions @ loop.law.matrix.T)))
    logits, _ = last(real, oracle["prompt_ids"], sl.Controller(loops))
    expected = control["steered/multi/last/lam1_alt1.5/logits/every8"]
    assert (logits - expected).abs().max() < 1e-3, "the joint setpoint is 0.35 away"


@pytest.mark.real_model
def test_tracking_of_a_trajectory(real, fitted, control):
    logits, record = last(real, control["tracking/ids"], fitted["track"])
    assert (logits - control["tracking/logits/every8"]).abs().max() < 1e-3
    for t, u in record.layers("u").items():
        torch.testing.assert_close(u[0, -1].cpu().float(), control["tracking/U"][t], rtol=1e-3, atol=1e-3)
