"""Evaluations whose forward passes run on a real NDIF server, which returns numbers and no logits."""

from __future__ import annotations

import pytest
from evaluating import items, words

import steerlens as sl
from remote.expect import clean
from steerlens.evaluate import Arm, Bench, compare, kl, likelihood, neutral_loss, propensity

pytestmark = pytest.mark.remote


@pytest.mark.parametrize("method", ["caa", "lqr"])
def test_likelihoods_divergences_and_dose_are_those_of_local_weights(method, client, local):
    case = local(method)
    benches = [Bench(model, words(6, 3), batch=4) for model in (case.model, sl.remote(client))]
    meters = [kl(tokens=5), kl(tokens=5, at="p95"), propensity(items(3)), likelihood([" w3 w4 w5", "w6 w7 w8"])]
    # what is sampled on a server is drawn there; the same texts are measured on both
    for tokens in (5, benches[0].max_new_tokens):
        benches[0].continuations(benches[0].prompts, tokens)
    benches[1]._continuations.update(benches[0]._continuations)
    for arm in (Arm("steered", case.controller, 0.7), Arm("prompt", instruction="w1 w2"), Arm("plain")):
        for meter in meters:
            found, expected = (meter(bench, arm) for bench in reversed(benches))
            assert [len(own) for own in found] == [len(own) for own in expected]
            for mine, theirs in zip(found, expected, strict=True):
                assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    doses = [bench.dose(Arm("steered", case.controller, 0.7)) for bench in benches]
    assert [value for own in doses[1] for value in own] == pytest.approx(
        [value for own in doses[0] for value in own], rel=1e-4
    )
    assert clean(client)


def test_compare_on_a_server(client, local, tmp_path):
    case = local("caa")
    found = compare(
        sl.remote(client),
        {"caa": case.controller},
        propensity(items(6)),
        budget=kl(tokens=4) <= 0.1,
        prompts=words(8, 3),
        damage=[neutral_loss(["w1 w2 w3", "w4 w5 w6 w7"])],
        baselines=("unsteered", "random"),
        seeds=2,
        file=tmp_path / "run.jsonl",
        progress=False,
    )
    table = found.table()
    assert {"unsteered", "random", "caa"} <= {str(name) for name in table.index.get_level_values(0)}
    assert found.calibrations["caa"]["met"] == "met"
    assert clean(client)
