"""Holding a direction on one side of a level, against plain PyTorch hooks, numpy and scipy."""

from __future__ import annotations

import numpy
import pytest
import torch
from scipy.optimize import minimize

import steerlens as sl
from steerlens.models import tiny
from steerlens.testing import Case, checks, discover_hosts
from steerlens.testing.case import NEGATIVE, POSITIVE, padding

LAYER = 2
TEXT = [3, 17, 25, 29, 41, 22, 46]
PAIRS = sl.Pairs([p + c for p, c in POSITIVE], [p + c for p, c in NEGATIVE])


@pytest.fixture(scope="module")
def plain():
    """A Hugging Face model with the weights of every tiny llama, which no library has wrapped."""
    return tiny("llama", host="hf")[0]


def run(model, ids, change=None):
    """Logits, and the state after the block as it leaves it, under one plain hook."""
    seen = {}

    def hook(_, args, output):
        x = output if isinstance(output, torch.Tensor) else output[0]
        seen["x"] = x
        if change is None:
            return None
        return x + change(x) if isinstance(output, torch.Tensor) else (x + change(x), *output[1:])

    handle = model.model.layers[LAYER].register_forward_hook(hook)
    try:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
    finally:
        handle.remove()
    return logits, seen["x"][0]


def means(model):
    """Mean activation of the last tokens of both sides."""
    return [
        torch.stack([run(model, text)[1][-1] for text in side]).mean(0) for side in (PAIRS.positive, PAIRS.negative)
    ]


@pytest.mark.parametrize("side", ["at_least", "at_most", "at"])
def test_a_hold_is_the_hook_that_its_equation_describes(host, device, plain, side):
    case = Case("hold", host, device=device)
    controller = sl.hold(case.model, PAIRS, side=side, level=0.5, where="all", layers=LAYER)
    positive, negative = means(plain)
    v = (positive - negative) / (positive - negative).norm()
    beta = 0.5 * (positive - negative).norm() + v @ negative

    def change(x):
        gap = beta - x @ v
        gap = {"at_least": gap.clamp(min=0), "at_most": gap.clamp(max=0), "at": gap}[side]
        gap[:, 0] = 0  # position 0 is left alone
        return gap[..., None] * v

    expected, x = run(plain, TEXT, change)
    with case.steer(controller=controller, record="all") as steered:
        found = case.logits(torch.tensor([TEXT]))
    torch.testing.assert_close(found[0].cpu(), expected, atol=1e-4, rtol=1e-4)
    acted = steered.record["blocks.2.hook_steer_acted"][0, 1:].cpu()
    outside = {"at_least": x @ v < beta, "at_most": x @ v > beta, "at": x @ v != beta}[side]
    assert torch.equal(acted, outside[1:].float())
    if side != "at":
        assert 0 < acted.mean() < 1, "the text must have tokens on both sides, or the test shows nothing"


def test_a_quantile_is_numpys_over_all_tokens_but_the_first(host, device, plain):
    texts = [TEXT, [7, 30, 31, 32, 33], [9]]
    v = numpy.zeros(32)
    v[3], v[8] = 1, -2
    model = Case("hold", host, device=device).model
    controller = sl.hold(model, v, unit="quantile", level=0.25, texts=texts, layers=LAYER)
    states = torch.cat([run(plain, text)[1][1:] for text in texts]).double().numpy()
    expected = numpy.quantile(states @ (v / numpy.linalg.norm(v)), 0.25)
    assert controller.recipe["found"]["levels"][0][0] == pytest.approx(expected, abs=1e-5)


def test_a_linear_barrier_is_the_least_control_under_which_it_holds():
    """scipy fits the probe and solves the quadratic program, knowing nothing of either's closed form."""
    case = Case("hold", discover_hosts()[0], dtype=torch.float64)
    margin = 3.0
    controller = sl.hold(case.model, PAIRS, direction="probe", unit="logit", level=margin, layers=LAYER, where="all")
    model = tiny("llama", host="hf", dtype=torch.float64)[0]
    x = torch.stack([run(model, text)[1][-1] for text in (*PAIRS.positive, *PAIRS.negative)]).numpy()
    y = numpy.array([1.0] * 3 + [-1.0] * 3)

    def loss(p):
        h = y * (x @ p[:-1] + p[-1])
        s = -y / (1 + numpy.exp(h))
        return p[:-1] @ p[:-1] / 2 + numpy.logaddexp(0, -h).sum(), numpy.append(p[:-1] + s @ x, s.sum())

    fitted = minimize(loss, numpy.zeros(33), jac=True, method="BFGS", options={"gtol": 1e-10}).x
    w, b = fitted[:-1], fitted[-1]
    token = run(model, TEXT)[1][-1].numpy()
    assert w @ token + b < margin, "a barrier that holds already shows nothing"
    least = minimize(
        lambda u: (u @ u / 2, u),
        numpy.zeros(32),
        jac=True,
        method="SLSQP",
        constraints={"type": "ineq", "fun": lambda u: w @ (token + u) + b - margin, "jac": lambda u: w},
        options={"ftol": 1e-14},
    ).x
    with case.steer(controller=controller, record="all") as steered:
        case.logits(torch.tensor([TEXT]))
    # BFGS stops at a gradient of 1e-10 or where rounding stops it
    numpy.testing.assert_allclose(steered.record["blocks.2.hook_steer_u"][0, -1].numpy(), least, atol=1e-5)


def test_a_plane_moves_what_is_outside_and_leaves_the_rest():
    rows = torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0]]).double()
    bound = torch.tensor([2.0, 1.0]).double()
    free = torch.full((2,), torch.inf).double()
    target = sl.Range(rows, bound, free, bound, free)
    x = torch.tensor([[0.0, 0, 5], [3, 0, 5], [3, -9, 5], [0, 9, 5]]).double()
    after = (x + target.error(x)) @ rows.T
    before = x @ rows.T
    torch.testing.assert_close(after, torch.where(before < bound, bound, before))
    acted = target.measure(x)[1]["acted"]()
    assert acted.tolist() == [1, 0, 1, 1]


def test_a_trigger_spares_the_tokens_above_it_and_strength_2_mirrors():
    v = torch.tensor([[0.0, 1.0]])
    free = torch.tensor([torch.inf])
    target = sl.Range(v, torch.tensor([5.0]), free, torch.tensor([1.0]), free)
    x = torch.tensor([[0.0, 0.0], [0, 2], [0, 7]])
    assert (x + target.error(x))[:, 1].tolist() == [5, 2, 7]
    case = Case("hold", discover_hosts()[0])
    controller = sl.hold(case.model, torch.eye(32)[4], level=10, layers=LAYER, strength=2.0)
    with case.steer(controller=controller, record="all") as steered:
        case.logits(torch.tensor([TEXT]))
    record = steered.record
    before, u = record["blocks.2.hook_steer_projection"][0, -1], record["blocks.2.hook_steer_u"][0, -1, 4]
    torch.testing.assert_close(before + u, 20 - before)


@pytest.mark.parametrize(
    "name", ["cache_on_equals_off", "batch_row_equals_row_alone", "saves_and_loads", "composes_in_order"]
)
def test_promises_hold_for_a_level_of_ones_own_state(name, device):
    """The default and its conformance cover the rest; this one has a second pass."""
    case = Case("hold", discover_hosts()[0], device=device, options={"origin": "own", "layers": [1, 2]})
    (check,) = [check for check in checks() if check.__name__ == f"check_{name}"]
    check(case)


def test_gates_and_schedules_act_on_each_row_of_a_left_padded_batch(device):
    case = Case("hold", discover_hosts()[0], device=device)
    gate = sl.gate(case.model, sl.Pairs([TEXT[:5], [7, 17, 26, 30, 42]], [[50, 60, 70], [51, 61, 71]]), gate_layers=1)
    held = sl.schedule(sl.when(sl.hold(case.model, PAIRS, level=3.0, where="all"), gate), [0.5])
    rows = [TEXT, [50, 60, 71, 9]]
    ids = torch.tensor([rows[0], [0, 0, 0, *rows[1]]])
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    with padding(case.model, "left"), case.steer(controller=held, record="all") as steered:
        batch = case.logits(ids, mask)
    gates = steered.record["blocks.2.hook_steer_gate"][:, -1]
    assert gates.tolist() == [1, 0]
    for row, logits in zip(rows, batch, strict=True):
        with case.steer(controller=held):
            case.close(logits[-len(row) :], case.logits(torch.tensor([row]))[0], "a row of the batch", 10)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"unit": "logit"}, "direction='probe'"),
        ({"unit": "quantile"}, "no default level"),
        ({"unit": "quantile", "level": 1.5}, "between 0 and 1"),
        ({"unit": "quantile", "level": 0.5, "origin": "own"}, "has its own"),
        ({"trigger": 2.0}, "above the level"),
        ({"side": "at", "trigger": 0.0}, "a trigger is for"),
        ({"level": [1.0, 2.0]}, "2 numbers for 1 directions"),
        ({"texts": [[1, 2]]}, "texts= is for unit='quantile'"),
        ({"point": "z"}, "no point 'z'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        sl.hold(tiny("llama", host=discover_hosts()[0]), PAIRS, **options)


@pytest.mark.parametrize(
    ("data", "options", "error", "words"),
    [
        (torch.ones(31), {"level": 1}, ValueError, "31 numbers; the state at"),
        (torch.zeros(32), {"level": 1}, ValueError, "zero or not finite"),
        (torch.ones(2, 32), {"level": 1}, ValueError, "linearly dependent"),
        ({1: torch.ones(32)}, {"level": 1, "layers": 2}, ValueError, "no direction for layer 2"),
        (torch.ones(32), {"unit": "separation"}, ValueError, "refers to contrast texts"),
        (torch.ones(32), {"unit": "quantile", "level": 0.5}, ValueError, "give texts="),
        ({1: "north"}, {"level": 1}, TypeError, "holds no numbers"),
        ("north", {}, TypeError, "give steerlens.Pairs"),
    ],
)
def test_directions_that_are_none_are_refused(data, options, error, words):
    with pytest.raises(error, match=words):
        sl.hold(tiny("llama", host=discover_hosts()[0]), data, **options)
