"""Gates that decide for each token, and strengths that follow a probe: against plain hooks, on every host."""

from __future__ import annotations

import pytest
import torch

import steerlens as sl
from steerlens.fit.contrast import Pairs
from steerlens.models import tiny
from steerlens.testing import Case

OPEN = [[3, 17, 25, 29, 41], [7, 17, 26, 30, 42], [9, 18, 25, 31, 43]]
CLOSED = [[50, 60, 70, 80, 90], [51, 61, 71, 81, 91], [52, 62, 72, 82, 92]]
PROMPTS = Pairs(OPEN, CLOSED)
IDS = torch.tensor([[3, 17, 25, 80, 90], [50, 60, 25, 29, 90]])


@pytest.fixture(scope="module")
def case(host, device):
    return Case("caa", host, device=device)


def by_hand(tokens, vector, factor, layer=2, looked=1, start=1):
    """Logits of one row: `factor(state after a block)` times a vector, added after a later block."""
    model, _ = tiny(host="hf")
    states = {}

    def keep(module, args, output):
        states["x"] = output[0] if isinstance(output, tuple) else output

    def add(module, args, output):
        x = output[0] if isinstance(output, tuple) else output
        u = factor(states["x"])[..., None] * vector
        u[:, :start] = 0
        return (x + u, *output[1:]) if isinstance(output, tuple) else x + u

    handles = [
        model.model.layers[looked].register_forward_hook(keep),
        model.model.layers[layer].register_forward_hook(add),
    ]
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return logits


def factors(gate):
    """A gate's decisions about states, written a second time."""
    v, b = gate.condition.direction, gate.condition.threshold

    def step(x):
        return ((x @ v - b) > 0).float()

    def linear(x):
        there = gate.condition
        return (there.offset + there.slope * (x @ v - b)).clamp(there.low, there.high)

    def logistic(x):
        return 1 / (1 + torch.exp(-(x @ v - b)))

    return {"Side": step, "Ramp": linear, "Probability": logistic}[type(gate.condition).__name__]


@pytest.mark.parametrize("curve", ["step", "linear", "logistic"])
def test_each_token_is_steered_by_its_own_decision(case, curve):
    controller = sl.caa(case.model, case.data, layers=2, strength=3.0, where="all")
    gate = sl.gate(case.model, PROMPTS, gate_layers=1, curve=curve)
    vector = 3.0 * controller.loops[0].law.vector
    gated = sl.when(controller, gate, each_token=True)
    with torch.no_grad(), case.steer(controller=gated, record="all") as run:
        logits = case.logits(IDS)
    opened = run.record.layers("gate")[2][:, 1:]
    assert bool(run.record.layers("gate")[2][:, :1].isnan().all()), "position 0 is not steered"
    assert len(opened.unique()) > 1, "the gate decides alike for all tokens"
    for row, tokens in enumerate(IDS.tolist()):
        case.close(logits[row], by_hand(tokens, vector, factors(gate)), f"row {row}", factor=10)
    # the second of two generated tokens is decided about by itself, with a cache and without
    with case.steer(controller=gated, record="all") as run:
        on = case.generate(IDS, 5)
        record = run.record.copy()
        assert torch.equal(on, case.generate(IDS, 5, cache=False))
    for tokens in on.tolist():
        expected = by_hand(tokens[:-1], vector, factors(gate))
        assert expected[4:].argmax(-1).tolist() == tokens[5:]
    assert record.layers("score")[2].shape == (2, 9)
    again = [float(g) for g in factors(gate)(_states(on[0, :-1].tolist(), vector, gate))[1:]]
    torch.testing.assert_close(record.layers("gate")[2][0, 1:].tolist(), again, rtol=1e-4, atol=1e-4)


def _states(tokens, vector, gate):
    """What a gate at block 1 reads in a steered pass."""
    seen = []

    def note(x):
        seen.append(x[0].clone())
        return factors(gate)(x)

    by_hand(tokens, vector, note)
    return seen[0]


def test_closed_tokens_are_left_as_they_were_bit_for_bit(case):
    controller = sl.caa(case.model, case.data, layers=2, strength=3.0, where="all")
    gate = sl.gate(case.model, PROMPTS, gate_layers=0)
    shut = sl.when(controller, gate, ~gate, each_token=True)
    with torch.no_grad():
        plain = case.logits(IDS)
        with case.steer(controller=shut):
            assert torch.equal(case.logits(IDS), plain)


def test_a_gate_at_the_acting_site_sees_what_loops_before_it_added(case):
    """As a law does that senses where it acts."""
    v = torch.eye(32)[3]
    push = sl.Controller([sl.Loop(sl.Add(100 * v), sl.Site(2), where="all")])
    gate = sl.Gate(sl.Side(v, torch.tensor(50.0)), [sl.Summary(sl.Site(2))])
    gated = sl.when(sl.Controller([sl.Loop(sl.Add(torch.eye(32)[5]), sl.Site(2), where="all")]), gate, each_token=True)
    for controller, opened in ((push + gated, 1.0), (gated + push, 0.0)):
        with torch.no_grad(), case.steer(controller=controller, record="all") as run:
            case.logits(IDS)
        name = next(name for name in run.record if name.endswith("_gate"))
        assert bool((run.record[name][:, 1:] == opened).all())


def test_scored_equals_generated_and_saved(case, tmp_path):
    controller = sl.when(
        sl.caa(case.model, case.data, layers=[2, 3], strength=3.0),
        sl.gate(case.model, PROMPTS, gate_layers=1, curve="linear", low=None, high=None),
        each_token=True,
    )
    controller.save(tmp_path / "gated.safetensors")
    loaded = sl.Controller.load(tmp_path / "gated.safetensors")
    assert [gate.each_token for loop in loaded.loops for gate in loop.gates] == [True, True]
    with case.steer(controller=controller, record="all") as run:
        tokens = case.generate(IDS, 5)
        record = run.record.copy()
    with torch.no_grad(), case.steer(controller=loaded, record="all") as run, run.scoring(5):
        logits = case.logits(tokens[:, :-1])
    assert torch.equal(logits[:, 4:].argmax(-1), tokens[:, 5:])
    for layer in (2, 3):
        case.close(run.record.layers("gate")[layer][:, 4:], record.layers("gate")[layer][:, 4:], "gate", factor=20)


def test_heads_can_be_what_a_gate_reads(case):
    controller = sl.caa(case.model, case.data, layers=2, where="all")
    gate = sl.gate(case.model, PROMPTS, gate_layers=1, point="z", curve="linear")
    for each_token in (True, False):
        with torch.no_grad(), case.steer(controller=sl.when(controller, gate, each_token=each_token)) as run:
            case.logits(IDS)
        assert bool(run.record.layers("gate")[2][:, 1:].isfinite().all())


def test_as_hooks(case):
    if case.host != "hooked":
        pytest.skip("fwd_hooks are of TransformerLens; HookedTransformer stands for both")
    controller = sl.when(
        sl.caa(case.model, case.data, layers=2, strength=3.0, where="all"),
        sl.gate(case.model, PROMPTS, gate_layers=1),
        each_token=True,
    )
    with torch.no_grad():
        hooked = case.model.run_with_hooks(IDS, fwd_hooks=controller.fwd_hooks())
        with case.steer(controller=controller):
            assert torch.equal(case.logits(IDS), hooked)


def test_what_cannot_be_decided_is_refused(case):
    controller = sl.caa(case.model, case.data, layers=2)
    gate = sl.gate(case.model, PROMPTS, gate_layers=3)
    with pytest.raises(ValueError, match=r"by blocks\.3\.hook_resid_post, which comes after .*gate_layers=range\(2\)"):
        sl.when(controller, gate, each_token=True)
    sl.when(controller, gate)
    with pytest.raises(ValueError, match="curve='cubic'"):
        sl.gate(case.model, PROMPTS, curve="cubic")
    with pytest.raises(ValueError, match="bound a straight line"):
        sl.gate(case.model, PROMPTS, high=2.0)
    with pytest.raises(ValueError, match="not above the largest"):
        sl.gate(case.model, PROMPTS, curve="linear", low=2.0)


def test_curves_agree_at_the_means(case):
    """The line is 0 at the negative mean 1 at the positive one; the probe tells the texts apart."""
    line, probe = (sl.gate(case.model, PROMPTS, gate_layers=1, curve=curve) for curve in ("linear", "logistic"))
    from steerlens.gating import prompt_states
    from steerlens.hosts import host_of

    states = prompt_states(host_of(case.model), PROMPTS, [sl.Site(1)], "mean")[sl.Site(1)]
    means = [line.decide([side.mean(0, keepdim=True)])[0].item() for side in states]
    assert means == pytest.approx([1.0, 0.0], abs=1e-4)
    positive, negative = (probe.decide([side])[0] for side in states)
    assert bool((positive > 0.5).all())
    assert bool((negative < 0.5).all())
