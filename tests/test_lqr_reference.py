"""A-LQR on SmolLM2 against reference numbers, on every host."""

from __future__ import annotations

import pytest
import torch

import steerlens as sl
from steerlens.hosts import host_of
from steerlens.testing import Case

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def case(host, smol, texts, device):
    case = Case("lqr", host, device=device, model=smol(host), options={"paper": True})
    case.data = sl.Pairs(texts["texts_pos"], texts["texts_neg"])
    plant = sl.linearize(case.model, texts["texts_pos"][:1], progress=False)
    case.plant = plant
    case.controller = case.fit(linearization=plant)
    return case


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_jacobians(case, oracle):
    for t in (1, 15):
        assert relative(case.plant.jacobians[t][:16], oracle[f"A_single/{t}/rows"]) < 1e-5


def test_directions_and_gains(case, oracle):
    assert case.controller.layers == list(range(1, 30)), "all texts end in a full stop: layer 0 has no direction"
    for weights in ({"q": 0.1, "qf": 0.1}, {"q": 1.0, "qf": 1.0}):
        controller = case.fit(linearization=case.plant, **weights)
        key = f"g/single/q{weights['q']:g}_r1_qf{weights['qf']:g}"
        for loop in controller.loops:
            t = loop.act.layer
            assert relative(loop.law.gains[0].cpu(), oracle[key][t]) < 1e-4
            assert relative(loop.law.setpoint.basis[0].cpu(), oracle["V"][t]) < 1e-4
            assert float(loop.law.setpoint.level) == pytest.approx(float(oracle["mu"][t]), rel=1e-4)


@pytest.mark.parametrize(("where", "key"), [("last", "last"), (slice(0, None), "all")])
def test_steered_logits(case, oracle, where, key):
    with case.steer(where=where, record="all") as run, torch.no_grad():
        logits = case.logits(oracle["prompt_ids"])
    expected = oracle[f"steered/linear/{key}/lam1/logits"]
    difference = (logits[0, -1, : len(expected)].float().cpu() - expected).abs().max()
    assert difference < 1e-3, "the nearest wrong rule is 0.23 away"
    if key == "last":
        for t, u in run.record.layers("u").items():
            assert relative(u[0, -1].cpu(), oracle["steered/linear/last/lam1/U"][t]) < 1e-3


def test_greedy_tokens(case, oracle):
    expected = oracle["greedy/last/lam1"].tolist()
    with case.steer():
        assert case.generate(oracle["prompt_ids"], 16)[0].tolist() == expected
    assert case.generate(oracle["prompt_ids"], 16)[0].tolist() == oracle["greedy/unsteered"].tolist()


def test_streaming_equals_a_linearization(case):
    streamed = case.fit(linearize_on=[case.data.positive[0]])
    for a, b in zip(streamed.loops, case.controller.loops, strict=True):
        assert relative(a.law.gains, b.law.gains) < 1e-6


def test_full_gain_is_kept_on_request(case):
    controller = case.fit(linearization=case.plant, full_gain=True)
    law = controller.loops[3].law
    torch.testing.assert_close(law.matrix @ law.setpoint.basis[0], law.gains[0], rtol=1e-4, atol=1e-5)
    assert case.controller.loops[3].law.matrix is None


def test_weights_of_another_model_are_refused(case, tiny_model):
    with pytest.raises(ValueError, match="linearization is of another model: n_layers is 4, it was 30"):
        sl.lqr(tiny_model("bridge"), sl.Pairs([[1, 2]], [[3, 4]]), linearization=case.plant, paper=True)


def test_nominal_states_are_the_models_own(case, texts):
    host = host_of(case.model)
    tokens = case.data.sides(host)[0].tokens[0]
    sites = [sl.Site(t, "resid_pre") for t in (0, 7, 29)]
    read = host.read([tokens], [[0.0] * (len(tokens) - 1) + [1.0]], sites)
    nominal = host.nominal(tokens)
    for site in sites:
        assert relative(nominal.states[site.layer].cpu(), read[site][0]) < 1e-5
