"""Predictions against measurements: equal where the plant is linear, bounded where it is not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import steerlens as sl
from steerlens.control.riccati import CostToGo
from steerlens.core import Law, Setpoint
from steerlens.diagnose import Lyapunov, closed_loop, linearity, similarity, tracking, tracking_bound
from steerlens.hosts import Nominal, host_of
from steerlens.hosts.base import Host
from steerlens.models import tiny
from steerlens.testing import Case

T, D = 5, 24


class LinearHost(Host):
    """A model without weights: T blocks that are exactly linear."""

    library, n_layers, d_model, n_heads, d_head, d_mlp, d_vocab = "none", T, D, 1, D, None, 100
    device, dtype, tokenizer, model, prepends_bos = torch.device("cpu"), torch.float64, None, None, False

    def __init__(self, A, curvature=0.0):
        self.A, self.curvature = A, curvature

    def points(self):
        return ("resid_pre", "resid_post")

    def probe(self):
        return None

    def nominal(self, tokens):
        generator = torch.Generator().manual_seed(int(tokens[-1]))
        states = [torch.randn(D, generator=generator, dtype=torch.float64)]
        blocks = [lambda x, A=A: x @ A.T + self.curvature * x**2 for A in self.A]
        for block in blocks:
            states.append(block(states[-1][None])[0])
        return Nominal(blocks, states)


class Origin(Setpoint):
    """The whole state at a point."""

    def __init__(self, point):
        self.point = point
        self.basis = torch.eye(len(point), dtype=point.dtype)

    def measure(self, x):
        c = self.point - x
        return c, {"error": lambda: c.norm(dim=-1)}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module", name="A")
def jacobians():
    return torch.eye(D) + random(T, D, D) / (2 * D**0.5)


@pytest.fixture(scope="module")
def plant(A):
    return sl.Linearization(A, torch.zeros(T + 1, D), LinearHost(A).fingerprint(), 1)


def regulator(A, *, q=0.3, r=1.2, qf=0.7, model=None, where="last"):
    """The whole-state regulator to the origin."""
    cost, loops = CostToGo.scalar(qf, A.shape[1]), []
    for t in range(len(A) - 1, -1, -1):
        K = cost.step(A[t], q, r)
        setpoint = Origin(torch.zeros(A.shape[1], dtype=torch.float64))
        law = sl.Feedback(setpoint, K.T, matrix=K)
        loops.append(sl.Loop(law, sl.Site(t, "resid_post"), sl.Site(t, "resid_pre"), where=where, name="lqr"))
    recipe = {"method": "test", "arguments": {"q": q, "r": r, "qf": qf}, "model": model}
    return sl.Controller(reversed(loops), recipe), cost.S


def level_loops(A, *, q=0.3, r=1.2, qf=0.7):
    """Rank-one feedback on a direction at every block, as A-LQR's."""
    cost, loops = CostToGo.scalar(qf, D), []
    for t in range(T - 1, -1, -1):
        K = cost.step(A[t], q, r)
        v = random(D, seed=t)
        v = v / v.norm()
        law = sl.Feedback(sl.Level(v, 3.0), (K @ v)[None], matrix=K)
        loops.append(sl.Loop(law, sl.Site(t, "resid_post"), sl.Site(t, "resid_pre"), name="lqr"))
    return sl.Controller(reversed(loops), {"arguments": {"q": q, "r": r, "qf": qf}})


# -- the bound -----------------------------------------------------------------------------------------------------


def test_weights_and_bound_equal_the_reference(oracle):
    weights = Lyapunov(list(oracle["tiny/bound/A_cl"]))
    for t, C in enumerate(weights.factors):
        torch.testing.assert_close(C @ C.T, oracle["tiny/bound/P"][t], rtol=0, atol=1e-9)
    torch.testing.assert_close(weights.contraction(), oracle["tiny/bound/one_step_opnorm"], rtol=0, atol=1e-9)
    bound = tracking_bound(
        weights.transitions(),
        oracle["tiny/bound/L"],
        oracle["tiny/bound/dz_Pnorm"],
        weights.norm(0, oracle["tiny/bound/delta0"]),
    )
    torch.testing.assert_close(bound, oracle["tiny/bound/bound"], rtol=0, atol=1e-9)


def test_transition_norms_and_dual_norms_are_largest_ratios():
    """Both against what they mean: the maximum over many states is below them, and attained."""
    A = random(3, 6, 6, seed=1)
    weights = Lyapunov(list(A))
    phi = A[2] @ A[1]
    P = [C @ C.T for C in weights.factors]
    values = np.linalg.eigvals(np.linalg.solve(P[1].numpy(), (phi.T @ P[3] @ phi).numpy()))
    assert float(weights.transitions()[3, 1]) == pytest.approx(math.sqrt(max(values.real)), rel=1e-9)
    z, d = random(6, seed=2), random(1000, 6, seed=3)
    assert ((d @ z) / weights.norm(2, d)).max() <= weights.dual(2, z)
    worst = torch.linalg.solve(P[2], z)
    torch.testing.assert_close((worst @ z) / weights.norm(2, worst), weights.dual(2, z))


@pytest.mark.parametrize("curvature", [1e-4, 1e-3])
def test_the_bound_holds_and_is_not_idle_on_a_curved_plant(A, plant, curvature):
    host = LinearHost(A, curvature)
    result = tracking(host, [1, 2, 3], controller=level_loops(A))
    gap = (result.actual - result.predicted).abs()
    assert (gap <= result.bound * (1 + 1e-9)).all()
    assert gap[-1] > 1e-3 * result.bound[-1]
    assert (result.state_gap <= result.state_bound * (1 + 1e-9)).all()
    assert result.state_gap[-1] > 1e-2 * result.state_bound[-1]


# -- a linear plant ------------------------------------------------------------------------------------------------


def test_on_a_linear_plant_the_prediction_is_what_happens(A, plant):
    host = LinearHost(A)
    for controller in (level_loops(A), regulator(A)[0]):
        result = tracking(host, [1, 2, 3], controller=controller, linearization=plant)
        torch.testing.assert_close(result.predicted, result.actual, rtol=0, atol=1e-10)
        assert result.state_error[1:].max() < 1e-10
        assert result.bound.max() < 1e-10
        assert result.state_bound.max() < 1e-10
        # before block 0 nothing has been added yet
        assert (result.unsteered - result.actual)[1:].abs().min() > 1e-2


def test_on_a_linear_plant_the_blocks_are_linear(A, plant):
    result = linearity(LinearHost(A), [[1, 2], [3, 4]], start=2, progress=False)
    assert result.block.shape == (5, T)
    assert result.path.shape == (5, T - 2)
    assert max(result.block.max(), result.path.max()) < 1e-10
    torch.testing.assert_close(result.similarity, torch.ones(T, dtype=torch.float64))


def test_on_a_linear_plant_the_realised_cost_is_the_predicted_one(A, plant):
    host = LinearHost(A)
    controller, S = regulator(A)
    result = tracking(host, [1, 2, 3], controller=controller, linearization=plant)
    final = Origin(torch.zeros(D, dtype=torch.float64))
    loop = closed_loop(controller, linearization=plant, along=result, final=final)
    torch.testing.assert_close(loop.realised, loop.predicted, rtol=1e-10, atol=0)
    x0 = host.nominal([1, 2, 3]).states[0]
    torch.testing.assert_close(loop.realised[0], x0 @ S @ x0, rtol=1e-10, atol=0)
    assert (loop.contraction < 1).all()
    # no other linear feedback is cheaper
    worse = tracking(host, [1, 2, 3], controller=controller * 1.2, linearization=plant)
    assert closed_loop(controller, linearization=plant, along=worse, final=final).realised[0] > loop.realised[0]


@pytest.mark.parametrize("kind", ["bridge", "nnsight"])
def test_a_linear_language_model_costs_what_is_predicted(kind):
    """Through the real machinery: a Llama whose attention is cut and whose MLP is linear, steered by `steer`."""
    model = linear_llama(kind)
    host = host_of(model)
    plant = sl.linearize(model, [[5, 6, 7]], progress=False)
    plant.jacobians = torch.stack([host.nominal([5, 6, 7]).jacobian(t) for t in range(4)])  # in float64
    controller, S = regulator(plant.jacobians, model=host.fingerprint())
    case = Case("lqr", kind, model=model, options={"paper": True})
    with sl.steer(model, controller, record="scalars") as run, torch.no_grad():
        case.logits(torch.tensor([[1, 2, 3, 4]]))
    result = tracking(model, [1, 2, 3, 4], controller=controller, linearization=plant, record=run.record)
    torch.testing.assert_close(result.predicted, result.recorded, rtol=1e-10, atol=1e-10)
    x = result.rollout.states
    errors, controls = run.record.stack("error")[:, 0, -1], run.record.stack("u_norm")[:, 0, -1]
    realised = (0.3 * errors**2 + 1.2 * controls**2).sum() + 0.7 * x[-1] @ x[-1]
    torch.testing.assert_close(realised, x[0] @ S @ x[0], rtol=1e-10, atol=0)
    loop = closed_loop(
        controller, linearization=plant, along=result, final=Origin(torch.zeros(32, dtype=torch.float64))
    )
    torch.testing.assert_close(loop.realised[0], realised, rtol=1e-10, atol=0)
    assert linearity(model, [[1, 2, 3]], start=0, progress=False).path.max() < 1e-10


def linear_llama(kind):
    model = tiny("llama", host=kind, dtype=torch.float64)
    inner = model.original_model if kind == "bridge" else model._module
    for layer in inner.model.layers:
        block = getattr(layer, "original_component", layer)
        attention, mlp, norm = (
            unwrap(getattr(block, name)) for name in ("self_attn", "mlp", "post_attention_layernorm")
        )
        torch.nn.init.zeros_(unwrap(attention.o_proj).weight)
        unwrap(mlp.down_proj).weight.data *= 0.3
        norm.forward = lambda x: x
        mlp.forward = lambda x, mlp=mlp: mlp.down_proj(mlp.up_proj(x))
    return model


def unwrap(module):
    return getattr(module, "original_component", module)


# -- linearity -----------------------------------------------------------------------------------------------------


def test_similarity_of_equal_turned_and_unrelated_jacobians():
    B = random(40, 40, seed=4)
    assert similarity(B, 3 * B) == pytest.approx(1)
    U, s, Vh = torch.linalg.svd(B)
    other = torch.linalg.qr(random(40, 40, seed=5)).Q
    assert similarity(B, U @ torch.diag(s) @ other) == pytest.approx(1), "inputs do not matter, outputs do"
    turned = torch.cat([U[:, 2:], U[:, :2]], dim=1) @ torch.diag(s) @ Vh
    assert similarity(B, turned) < 1e-6, "its two leading outputs are orthogonal to those of B"


def test_the_baseline_is_that_of_random_subspaces():
    """The mean singular value of a k x k Gaussian matrix is 8/(3 pi) sqrt(k) for large k."""
    model = tiny("llama", host="nnsight", d_model=320)
    result = linearity(model, [[1, 2, 3]], sizes=(0.1,), directions=1, progress=False)
    assert result.baseline == pytest.approx(8 / (3 * math.pi) * math.sqrt(16 / 320), rel=0.05)
    assert result.similarity.isnan().all()


def test_the_error_of_a_linear_model_grows_with_the_perturbation(tiny_model, host):
    model = tiny_model(host)
    result = linearity(model, [[1, 2, 3], [4, 5, 6, 7]], sizes=(0.001, 0.01, 0.1), progress=False)
    assert (result.block.diff(dim=0) > 0).all()
    ratio = result.block[1] / result.block[0]
    assert ((ratio > 5) & (ratio < 20)).all(), "first order in the size: a tangent"
    assert ((result.similarity > 0) & (result.similarity < 1)).all()


def test_directions_may_be_given_and_the_seed_fixes_the_others(tiny_model):
    model = tiny_model("nnsight")
    first, second = (linearity(model, [[1, 2, 3]], seed=3, progress=False) for _ in range(2))
    assert torch.equal(first.block, second.block)
    given = linearity(model, [[1, 2, 3]], directions=torch.eye(32)[:2], progress=False)
    assert not torch.equal(first.block, given.block)


# -- tracking in a model -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted():
    case = Case("lqr", "nnsight", options={"paper": True})
    return case, case.fit(full_gain=True, linearize_on=1)


def test_the_rollout_is_what_a_run_records(host):
    case = Case("lqr", host, options={"paper": True})
    ids = torch.tensor([[4, 8, 15, 16, 23, 42]])
    with case.steer() as run, torch.no_grad():
        case.logits(ids)
    result = tracking(case.model, ids[0].tolist(), controller=case.controller, record=run.record, bound=False)
    torch.testing.assert_close(result.actual, result.recorded, rtol=1e-4, atol=1e-4)
    with case.steer(controller=case.controller * 0) as run, torch.no_grad():
        case.logits(ids)
    torch.testing.assert_close(result.unsteered, run.record.stack("error")[:, 0, -1].double(), rtol=1e-4, atol=1e-4)
    assert result.bound.isnan().all()


def test_tables_and_plots(fitted):
    case, controller = fitted
    plant = sl.linearize(case.model, [[1, 2, 3, 4]], progress=False)
    result = tracking(case.model, [1, 2, 3, 4], controller=controller)
    loop = closed_loop(controller, linearization=plant, along=result)
    lines = linearity(case.model, [[1, 2, 3, 4], [1, 2, 3, 5]], progress=False)
    figures = [result.plot(), loop.plot(), *(lines.plot(kind) for kind in ("path", "block", "similarity"))]
    for figure in figures:
        assert figure.layout.xaxis.title.text == "layer"
        assert "(" in figure.layout.yaxis.title.text, "an axis names its unit"
    assert list(result.table().columns) == ["unsteered", "predicted", "actual", "recorded", "bound", "state_error"]
    assert result.table().index.tolist() == controller.layers
    assert loop.table().loc[controller.layers, "gain"].notna().all()
    assert "path 0.1" in lines.table().columns
    assert (loop.gain[controller.layers] >= loop.applied[controller.layers] - 1e-6).all()
    with pytest.raises(ValueError, match="kind='spectrum'"):
        lines.plot("spectrum")


# -- refusals ------------------------------------------------------------------------------------------------------


class Remembering(Law):
    signals = ("error",)

    def act(self, x, now):
        now.layers["seen"] = x
        return torch.zeros_like(x), {"error": lambda: x.norm(dim=-1)}


class Squared(Law):
    signals = ("error",)

    def act(self, x, now):
        return 0.1 * x**2, {"error": lambda: x.norm(dim=-1)}


@pytest.mark.parametrize(
    ("law", "site", "where", "words"),
    [
        (Remembering(), "resid_post", "last", "remembers earlier layers"),
        (Squared(), "resid_post", "last", "not affine in the state"),
        (Squared(), "mlp_out", "last", "inside a block"),
        (Squared(), "resid_post", "all", "does not steer where='last'"),
        (sl.Add(torch.zeros(D)), "resid_post", "last", "reports an error"),
    ],
)
def test_what_tracking_cannot_follow_is_refused(A, law, site, where, words):
    sense = "resid_pre" if site == "resid_post" else site
    controller = sl.Controller([sl.Loop(law, sl.Site(t, site), sl.Site(t, sense), where=where) for t in (1, 2)])
    with pytest.raises(ValueError, match=words):
        tracking(LinearHost(A), [1, 2], controller=controller)


def test_bad_input_says_what_is_wrong(A, plant, fitted):
    case, controller = fitted
    host = LinearHost(A)
    with pytest.raises(ValueError, match="linearization is of another model: n_layers is 4, it was 5"):
        tracking(case.model, [1, 2], controller=controller, linearization=plant)
    with pytest.raises(ValueError, match="holds no whole gain"):
        closed_loop(case.fit(linearize_on=1), linearization=plant)
    with pytest.raises(ValueError, match="no loop"):
        closed_loop(sl.Controller([]), linearization=plant)
    with pytest.raises(ValueError, match="recipe has no q, r, qf"):
        closed_loop(sl.Controller(regulator(A)[0].loops), linearization=plant)
    with pytest.raises(ValueError, match="at least one text"):
        linearity(host, [])
    with pytest.raises(ValueError, match="positive fractions"):
        linearity(host, [[1, 2]], sizes=(0.0,))
    with pytest.raises(ValueError, match="start=9"):
        linearity(host, [[1, 2]], start=9)
    with pytest.raises(ValueError, match=r"directions have shape \[1, 3\]"):
        linearity(host, [[1, 2]], directions=torch.ones(1, 3))


# -- a real model --------------------------------------------------------------------------------------------------


@pytest.mark.real_model
def test_prediction_and_bound_on_a_real_model(smol, texts):
    model = smol("nnsight")
    pairs = sl.Pairs(texts["texts_pos"], texts["texts_neg"])
    plant = sl.linearize(model, [texts["prompt"]], progress=False)
    controller = sl.lqr(model, pairs, linearization=plant, paper=True)
    result = tracking(model, texts["prompt"], controller=controller * 0.1, linearization=plant)
    # up to rounding in float32, of states of size 1e3
    assert ((result.actual - result.predicted).abs() <= result.bound + 1e-2).all()
    closer = (result.actual - result.predicted).abs() < (result.actual - result.unsteered).abs()
    assert closer.float().mean() > 0.8, "the linear model explains most of what a weak control does"
