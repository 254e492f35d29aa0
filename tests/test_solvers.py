"""The solvers of the regulator against reference numbers, brute force, and each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import DATA
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import steerlens as sl
from steerlens.control.gains import foresee, gains_of
from steerlens.control.lowrank import FeatureCostToGo
from steerlens.control.regulator import Weights, solve
from steerlens.control.riccati import CostToGo
from steerlens.control.targets import Targets
from steerlens.core import Now
from steerlens.hosts import host_of
from steerlens.hosts.blocks import nominal
from steerlens.hosts.blocks.nominal import SMALL
from steerlens.models import tiny
from steerlens.testing import Case, discover_hosts, peak

CPU = torch.device("cpu")
LENS = [name for name in discover_hosts() if name != "nnsight"]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Linear(sl.Linearization):
    """A plant that is exactly linear, in float64."""

    def __init__(self, layers, d, seed=0):
        A = torch.eye(d) + 0.5 * randn(layers, d, d, seed=seed) / d**0.5
        super().__init__(A, randn(layers + 1, d, seed=seed + 1), {}, 1)
        for t in range(layers):
            self.states[t + 1] = A[t] @ self.states[t]


def gains(solver, plant, weights, controlled, features):
    solved = solve(solver, plant, weights, controlled, features, device=CPU, progress=False)
    return {t: gain.matrix() for t, gain in solved}


def unit(rows):
    return rows / rows.norm(dim=-1, keepdim=True)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


# -- the algebra --------------------------------------------------------------------------------------------------


def test_output_gains_and_costs_equal_the_reference(oracle, texts):
    q, r, qf = (texts[f"tiny/output/{name}"] for name in ("q", "r", "qf"))
    A, V = oracle["tiny/A"], oracle["tiny/output/V"]
    cost = FeatureCostToGo(V[4:], qf)
    for t in range(3, -1, -1):
        pulled = cost.Z @ A[t]
        K = cost.step(pulled, V[t : t + 1], q, r).T @ pulled
        S = cost.Z.T @ torch.linalg.solve(cost.D, cost.Z)
        torch.testing.assert_close(K, oracle["tiny/output/K"][t], rtol=0, atol=1e-9)
        torch.testing.assert_close(S, oracle["tiny/output/S"][t], rtol=0, atol=1e-9)
        torch.testing.assert_close(K @ V[t], oracle["tiny/output/g"][t], rtol=0, atol=1e-9)


def test_output_equals_the_dense_recursion_with_the_same_cost():
    """Two features a layer, one of them missing at a layer; weights that vary; layers without a control."""
    plant = Linear(6, 9)
    features = [unit(randn(2, 9, seed=10 + t)) for t in range(7)]
    features[3][1] = 0
    q, r, qf = [0.3, 0.0, 1.0, 2.0, 0.1, 0.5], [1.0, 2.0, 0.5, 1.0, 3.0, 1.5], 0.7
    controlled = [1, 2, 4, 5]
    found = gains("output", plant, Weights(q, r, qf, 6), controlled, features)
    assert sorted(found) == controlled
    dense = CostToGo(qf * features[6].T @ features[6])
    for t in range(5, 0, -1):
        Q = q[t] * features[t].T @ features[t]
        if t in controlled:
            torch.testing.assert_close(found[t], dense.step(plant.jacobian(t), Q, r[t]), rtol=0, atol=1e-12)
        else:
            dense.coast(plant.jacobian(t), Q)


def test_terminal_cost_alone_is_of_rank_one_in_closed_form():
    plant, v = Linear(4, 5), unit(randn(5, 1, 5, seed=3))
    found = gains("output", plant, Weights([0.0] * 4, 2.0, 0.7, 4), range(4), list(v))
    z, c = v[4, 0], 0.7
    for t in range(3, -1, -1):
        before = plant.jacobian(t).T @ z
        torch.testing.assert_close(found[t], torch.outer(z, before) / (2.0 / c + z @ z))
        z, c = before, 1 / (1 / c + z @ z / 2.0)


def brute_force(plant, x0, q, r, qf, controlled, features=None, levels=None):
    """Controls of least cost by stacking the whole problem into one least squares."""
    T, d = len(plant), x0.shape[0]
    effect, free = np.zeros((T + 1, d, len(controlled) * d)), [x0.numpy()]
    for t in range(T):
        A = plant.jacobian(t).numpy()
        effect[t + 1] = A @ effect[t]
        if t in controlled:
            column = list(controlled).index(t) * d
            effect[t + 1][:, column : column + d] += np.eye(d)
        free.append(A @ free[t])
    rows, right = [], []
    for t in range(T + 1):
        weight = np.sqrt(qf if t == T else q)
        C = np.eye(d) if features is None else features[t].numpy()
        goal = np.zeros(len(C)) if levels is None else levels[t].numpy()
        rows.append(weight * C @ effect[t])
        right.append(weight * (goal - C @ free[t]))
    rows.append(np.sqrt(r) * np.eye(len(controlled) * d))
    right.append(np.zeros(len(controlled) * d))
    solution = np.linalg.lstsq(np.concatenate(rows), np.concatenate(right), rcond=None)[0]
    return torch.from_numpy(solution.reshape(len(controlled), d))


@pytest.mark.parametrize("controlled", [range(5), [0, 2, 3]])
def test_dense_gains_are_the_optimum_also_for_some_layers(controlled):
    plant, x = Linear(5, 4), randn(4, seed=8)
    found = gains("dense", plant, Weights(0.3, 1.2, 0.8, 5), controlled, [torch.zeros(0, 4)] * 6)
    expected = brute_force(plant, x, 0.3, 1.2, 0.8, controlled)
    for t in range(5):
        u = torch.zeros(4, dtype=torch.float64)
        if t in controlled:
            u = -found[t] @ x
            torch.testing.assert_close(u, expected[list(controlled).index(t)], rtol=1e-9, atol=1e-10)
        x = plant.jacobian(t) @ x + u


@pytest.mark.parametrize(("controlled", "blind"), [(range(5), []), ([1, 3], []), (range(5), [0, 3])])
def test_preview_is_the_optimum_for_a_linear_plant(controlled, blind):
    """Also at layers without a direction of their own, where it acts on what comes later."""
    plant, x = Linear(5, 6), randn(6, seed=8)
    v, levels = unit(randn(6, 1, 6, seed=5)), 3 * randn(6, 1, seed=6)
    v[blind], levels[blind] = 0, 0
    targets = Targets([sl.Level(v[t, 0], float(levels[t, 0])) for t in range(6)], torch.ones(6, 1))
    expected = brute_force(plant, x, 0.3, 1.2, 0.8, controlled, v, levels)
    solved = gains_of(plant, "output", Weights(0.3, 1.2, 0.8, 5), controlled, list(v), device=CPU, keep="factors")
    laws = {t: foresee(t, solved, targets) for t in controlled}
    for t in range(5):
        u = torch.zeros(6, dtype=torch.float64)
        if t in controlled:
            u = laws[t].act(x[None, None], Now())[0][0, 0]
            torch.testing.assert_close(u, expected[list(controlled).index(t)], rtol=1e-9, atol=1e-10)
        x = plant.jacobian(t) @ x + u


def test_scalar_is_exact_where_jacobians_are_orthogonal():
    plant = Linear(4, 5)
    plant.jacobians = torch.linalg.qr(plant.jacobians)[0]
    arguments = (plant, Weights(0.3, [1.0, 2.0, 0.5, 1.0], 0.8, 4), [0, 2, 3], [torch.zeros(0, 5)] * 5)
    dense, scalar = gains("dense", *arguments), gains("scalar", *arguments)
    for t, K in dense.items():
        torch.testing.assert_close(scalar[t], K)


# -- on models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_products_with_a_block_equal_products_with_its_jacobian(host, family, tiny_model):
    if (family, host) == ("gemma", "hooked"):
        pytest.skip("HookedTransformer cannot build a small Gemma")
    path = host_of(tiny_model(host, family)).nominal([3, 17, 25, 29, 41])
    rows = torch.randn(5, path.states[0].shape[0], generator=torch.Generator().manual_seed(0)).to(path.states[0])
    for t in (0, 3):
        A = path.jacobian(t)
        for room in (path.room, SMALL // 2):  # all at once, and two at a time
            path.room = room
            torch.testing.assert_close(path.jacobian(t), A)
            torch.testing.assert_close(path.pull(t, rows), rows @ A, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(path.push(t, rows), rows @ A.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LENS)
def test_pulled_gradients_are_those_of_the_whole_model(name, tiny_model):
    model, ids = tiny_model(name), [3, 17, 25, 29, 41]
    path = host_of(model).nominal(ids)
    v = torch.randn(32, generator=torch.Generator().manual_seed(1)).to(path.states[0])
    states = {}
    hooks = [(f"blocks.{t}.hook_resid_pre", lambda x, hook, t=t: states.__setitem__(t, x)) for t in (0, 1, 3)]
    with torch.enable_grad():
        model.run_with_hooks(torch.tensor([ids]).to(v.device), fwd_hooks=hooks)
        feature = states[3][0, -1] @ v
        whole = torch.autograd.grad(feature, [states[0], states[1]])
    z = {3: v[None]}
    for t in (2, 1, 0):
        z[t] = path.pull(t, z[t + 1])
    for t, gradient in enumerate(whole):
        torch.testing.assert_close(z[t][0], gradient[0, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", ["dense", "output", "scalar"])
def test_solvers_average_jacobians_over_the_texts(host, solver, tiny_model):
    case = Case("lqr", host, model=tiny_model(host), options={"paper": True})
    plant = sl.linearize(case.model, case.data.positive, progress=False)
    kept, live = case.fit(solver=solver, linearization=plant), case.fit(solver=solver, linearize_on=3)
    for a, b in zip(kept.loops, live.loops, strict=True):
        torch.testing.assert_close(a.law.gains, b.law.gains, rtol=1e-4, atol=1e-6)
    assert kept.recipe["found"]["linearized_on"] == live.recipe["found"]["linearized_on"] == 3


def test_a_recipe_names_what_was_solved(tiny_model):
    case = Case("lqr", discover_hosts()[0], model=tiny_model(discover_hosts()[0]), options={"paper": True})
    named = {
        case.fit(solver=solver, preview=preview, linearize_on=1).recipe["found"]["controller"]
        for solver, preview in (("dense", False), ("output", False), ("output", True), ("scalar", False))
    }
    expected = {"A-LQR", "output-weighted LQR", "output-weighted LQR with preview", "scalar approximation of A-LQR"}
    assert named == expected


def test_preview_acts_where_reaction_has_no_direction(host, tiny_model):
    one_last_token = sl.Pairs([[5, 9, 12, 31], [8, 9, 31]], [[5, 9, 13, 31], [8, 10, 31]])
    for preview, layers in ((False, [1, 2, 3]), (True, [0, 1, 2, 3])):
        controller = sl.lqr(
            tiny_model(host), one_last_token, solver="output", preview=preview, progress=False, paper=True
        )
        assert controller.layers == layers
        assert all(bool(loop.law.act(torch.zeros(1, 1, 32), Now())[0].any()) for loop in controller.loops)


def test_only_the_asked_layers_act(host, tiny_model):
    case = Case("lqr", host, model=tiny_model(host), options={"paper": True})
    for solver in ("dense", "output", "scalar"):
        assert case.fit(solver=solver, layers=[1, -1], q=[1, 0, 1, 0.5], r=[1, 2, 3, 4]).layers == [1, 3]


class Squares(TorchDispatchMode):
    """Counts the new square matrices of a width; views of the model's weights are none."""

    def __init__(self, model, d):
        super().__init__()
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.d, self.count = d, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor) and value.shape[-2:] == (self.d, self.d):
                self.count += value.untyped_storage().data_ptr() not in self.weights
        return out


def test_gradients_alone_need_no_square_matrix(tiny_model):
    """On TransformerBridge: HookedTransformer's own forward pass copies square weights."""
    case = Case("lqr", "bridge", model=tiny_model("bridge"), options={"paper": True})
    counts = {}
    for solver in ("dense", "output", "scalar"):
        with Squares(case.model, 32) as squares:
            case.fit(solver=solver, setpoint="angular" if solver == "scalar" else "level")
        counts[solver] = squares.count
    assert counts["dense"] > 0, "the counter sees nothing"
    assert counts["output"] == counts["scalar"] == 0


@pytest.mark.parametrize("texts", [1, 2])
def test_dense_needs_fewer_than_six_matrices(texts, monkeypatch):
    """The cost-to-go, one Jacobian and room for its rows; then two matrices to work with in place of that room."""
    monkeypatch.setattr(nominal, "SMALL", 0)  # a narrow model may take more
    d = 192
    model = tiny("llama", n_layers=2, d_model=d)
    pairs = sl.Pairs([[1, 2, 3, 4]] * 2, [[1, 2, 3]] * 2)
    floats = peak(lambda: sl.lqr(model, pairs, linearize_on=texts, progress=False, paper=True)) / 4
    assert 3 * d * d < floats < 6 * d * d


# -- against reference numbers ------------------------------------------------------------------------------------


@pytest.mark.real_model
def test_memory_for_a_longer_text_on_a_real_model(smol):
    """Neither logits of all its tokens nor keys and values for each gradient come with it."""
    d, ids = 576, list(range(100, 124))
    model, pairs = smol(discover_hosts()[0]), sl.Pairs([ids], [ids[:-2]])

    def held(solver):
        return peak(lambda: sl.lqr(model, pairs, solver=solver, linearize_on=1, progress=False, paper=True)) / 4

    assert held("dense") < 6 * d * d
    assert held("output") < 3 * d * d


@pytest.mark.real_model
def test_output_gains_on_a_real_model(host, smol, texts):
    pairs = sl.Pairs(texts["texts_pos"], texts["texts_neg"])
    expected = load_file(DATA / "control.safetensors")["g_output/single/q0.1_r1_qf0.1"]
    controller = sl.lqr(smol(host), pairs, solver="output", linearize_on=1, progress=False, paper=True)
    for loop in controller.loops:
        assert relative(loop.law.gains[0].cpu(), expected[loop.act.layer]) < 1e-4


@pytest.mark.real_model
def test_scalar_gains_are_off_by_what_the_docstring_says(smol, texts, oracle):
    model, pairs = smol(discover_hosts()[0]), sl.Pairs(texts["texts_pos"], texts["texts_neg"])
    controller = sl.lqr(model, pairs, solver="scalar", linearize_on=1, progress=False, paper=True)
    exact = oracle["g/single/q0.1_r1_qf0.1"]
    errors = [relative(loop.law.gains[0].cpu(), exact[loop.act.layer]) for loop in controller.loops]
    assert 0.4 < sorted(errors)[len(errors) // 2] < 0.5


@pytest.mark.real_model
@pytest.mark.parametrize(("q", "r", "qf"), [(0.1, 1, 0.1), (1, 1, 1), (100, 0.1, 1000), (0.1, 10, 1)])
def test_float32_gains_agree_with_float64_on_a_real_model(smol, texts, oracle, q, r, qf):
    plant = _plant(smol, texts)
    single = CostToGo.scalar(qf, 576, dtype=torch.float32)
    double = CostToGo.scalar(qf, 576)
    for t in range(29, -1, -1):
        v = oracle["V"][t].double()
        low, high = single.step(plant.jacobian(t), q, r), double.step(plant.jacobian(t), q, r)
        assert relative(low, high) < 1e-5
        assert not v.any() or relative(low @ v.float(), high @ v) < 1e-5


_PLANT = []


def _plant(smol, texts):
    if not _PLANT:
        _PLANT.append(sl.linearize(smol(discover_hosts()[0]), texts["texts_pos"][:1], progress=False))
    return _PLANT[0]
