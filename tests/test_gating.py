"""Gates, schedules and the methods built on them: decided on the unsteered prompt, row by row, kept while decoding."""

from __future__ import annotations

import pytest
import torch

import steerlens as sl
from steerlens.core import Now, Schedule
from steerlens.gating import best_separating
from steerlens.hosts import host_of
from steerlens.laws.feedback import Add
from steerlens.laws.scaling import Dynamic
from steerlens.methods.cast import pairwise_component
from steerlens.methods.tda import tail_threshold
from steerlens.testing import Case, discover_hosts, padding

OPEN = [[3, 17, 25, 29, 41], [7, 17, 26, 30, 42], [9, 18, 25, 31, 43]]
CLOSED = [[50, 60, 70, 80, 90], [51, 61, 71, 81, 91], [52, 62, 72, 82, 92]]
IDS = torch.tensor([OPEN[0], CLOSED[0]])


@pytest.fixture(scope="module")
def case(host, device):
    return Case("caa", host, device=device)


@pytest.fixture(scope="module")
def prompts():
    return sl.Pairs(OPEN, CLOSED)


def states(case, ids, layer, weights):
    """Unsteered states of prompts at a layer, pooled."""
    site = sl.Site(layer)
    return host_of(case.model).read(ids.tolist(), [weights] * len(ids), [site])[site]


def run(case, controller, ids, **options):
    with torch.no_grad(), case.steer(controller=controller, record="all", **options) as steered:
        logits = case.logits(ids)
    return logits, steered.record.copy()


# -- gates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 2], ids=["before", "behind"])
@pytest.mark.parametrize("pool", ["mean", "last"])
def test_an_open_row_is_steered_and_a_closed_one_is_not(case, prompts, layer, pool):
    """Also where the gate looks at a layer behind the steered one: it sees the prompt unsteered."""
    controller = sl.caa(case.model, case.data, layers=1, strength=3.0, where="all")
    gate = sl.gate(case.model, prompts, gate_layers=layer, pool=pool)
    plain, always = case.logits(IDS), run(case, controller, IDS)[0]
    logits, record = run(case, sl.when(controller, gate), IDS)
    assert torch.equal(logits[1], plain[1])
    case.close(logits[0], always[0], "the open row")
    weights = [0.0] + [0.25] * 4 if pool == "mean" else [0.0] * 4 + [1.0]
    (condition,) = [gate.condition]
    score = states(case, IDS, layer, weights) @ condition.direction - condition.threshold
    assert (score > 0).tolist() == [True, False]
    case.close(record.layers("score")[1][:, 1:], score[:, None].expand(-1, 4), "the score")
    assert record.layers("gate")[1][:, 1:].tolist() == [[1.0] * 4, [0.0] * 4]
    inverted = run(case, sl.when(controller, ~gate), IDS)[0]
    assert torch.equal(inverted[0], plain[0])
    case.close(inverted[1], always[1], "the other row")


@pytest.mark.parametrize("outer_first", [True, False])
def test_a_gate_sees_the_prompt_as_no_run_has_steered_it(case, prompts, outer_first):
    """Also where another run, which the gate's own does not know, steers before the layer at which it looks."""
    gated = sl.when(sl.caa(case.model, case.data, layers=3, where="all"), sl.gate(case.model, prompts, gate_layers=2))
    other = sl.caa(case.model, case.data, layers=1, strength=20.0, where="all")
    expected = run(case, gated, IDS)[1].layers("score")[3]
    first = case.steer(controller=other) if outer_first else case.steer(controller=gated, record="all")
    second = case.steer(controller=gated, record="all") if outer_first else case.steer(controller=other)
    try:
        case.logits(IDS)
        score = (second if outer_first else first).record
        score = next(value for name, value in score.items() if name.endswith("_score"))
    finally:
        first.remove()
        second.remove()
    case.close(score.nan_to_num(), expected.nan_to_num(), "the score", factor=5)


def test_gates_multiply(case, prompts):
    gate = sl.gate(case.model, prompts, gate_layers=0)
    controller = sl.caa(case.model, case.data, layers=1, where="all")
    never = sl.when(sl.when(controller, gate), ~gate)
    assert torch.equal(run(case, never, IDS)[0], case.logits(IDS))


def test_each_gate_records_what_it_measured(case, prompts):
    first, second = (sl.gate(case.model, prompts, gate_layers=layer) for layer in (0, 1))
    controller = sl.caa(case.model, case.data, layers=2, where="all")
    alone = [run(case, sl.when(controller, gate), IDS)[1]["blocks.2.hook_steer_score"] for gate in (first, second)]
    record = run(case, sl.when(controller, first, second), IDS)[1]
    both = [record[f"blocks.2.hook_steer_{name}"] for name in ("score", "score2")]
    torch.testing.assert_close(both, alone, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(alone[0][:, -1], alone[1][:, -1])


@pytest.mark.parametrize("layer", [0, 2], ids=["before", "behind"])
def test_the_decision_holds_for_a_generation(case, prompts, layer):
    """With a KV cache and without, the gate stays as the prompt left it, whatever is generated."""
    controller = sl.caa(case.model, case.data, layers=1, strength=3.0, where="all")
    gated = sl.when(controller, sl.gate(case.model, prompts, gate_layers=layer))
    plain = case.generate(IDS)
    with case.steer(controller=controller):
        always = case.generate(IDS)
    with case.steer(controller=gated, record="all") as steered:
        on, record = case.generate(IDS), steered.record.copy()
        off = case.generate(IDS, cache=False)
        for name, value in record.items():
            case.close(steered.record[name].nan_to_num(), value.nan_to_num(), name, factor=10)
    assert torch.equal(on, off)
    assert torch.equal(on[1], plain[1])
    assert torch.equal(on[0], always[0])
    assert not torch.equal(always[0], plain[0]), "the controller does nothing that a gate could hold back"
    gates = record.layers("gate")[1]
    assert bool((gates[0, 1:] == 1).all())
    assert bool((gates[1, 1:] == 0).all())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layer", [0, 2], ids=["before", "behind"])
@pytest.mark.parametrize("pool", ["mean", "last"])
def test_a_gate_does_not_see_pads(case, prompts, side, layer, pool):
    controller = sl.caa(case.model, case.data, layers=1, where="all")
    gated = sl.when(controller, sl.gate(case.model, prompts, gate_layers=layer, pool=pool))
    alone = run(case, gated, IDS[:1])[1].layers("score")[1][0, -1]
    pad = case.model.tokenizer.pad_token_id
    row = [pad] * 3 + OPEN[0] if side == "left" else OPEN[0] + [pad] * 3
    real = slice(3, None) if side == "left" else slice(0, 5)
    ids, mask = torch.tensor([row, [4, 5, 6, *CLOSED[0]]]), torch.ones(2, 8, dtype=torch.long)
    mask[0] = 0
    mask[0, real] = 1
    with padding(case.model, side), torch.no_grad(), case.steer(controller=gated, record="all") as steered:
        case.logits(ids, mask)
    case.close(steered.record.layers("score")[1][0, real][-1], alone, f"score with {side} padding", factor=10)


def test_every_method_can_be_gated(case, prompts):
    """A sum of methods, one of them conditional, another scheduled."""
    gate = sl.gate(case.model, prompts, gate_layers=0)
    lqr, angular = sl.lqr(case.model, case.data, progress=False, paper=True), sl.angular(case.model, case.data)
    b = sl.schedule(angular, [0.5], prompt=0.5)
    logits, _ = run(case, sl.when(lqr, gate) + b, IDS)
    with case.steer(controller=lqr):
        both = run(case, angular * 0.5, IDS)[0]
    case.close(logits[0], both[0], "the open row", factor=5)
    case.close(logits[1], run(case, b, IDS)[0][1], "the closed row")


def test_gate_and_schedule_are_saved(case, prompts, tmp_path):
    controller = sl.schedule(
        sl.when(sl.caa(case.model, case.data, where="all"), ~sl.gate(case.model, prompts)), [1.0, 0.5], prompt=0.25
    )
    controller.save(tmp_path / "c.safetensors")
    loaded = sl.Controller.load(tmp_path / "c.safetensors")
    assert loaded.recipe == controller.recipe
    assert torch.equal(run(case, loaded, IDS)[0], run(case, controller, IDS)[0])
    half = controller.to(dtype=torch.float16)
    assert half.loops[0].gates[0].condition.direction.dtype == torch.float16


def test_gates_choose_the_layer_that_separates_best():
    torch.manual_seed(0)
    a, b = torch.randn(20, 8), torch.randn(20, 8)
    sites = {sl.Site(0): (a, b), sl.Site(1): (a + 3, b), sl.Site(2): (10 * a + 3, 10 * b)}
    site, direction, middle = best_separating(sites)
    assert site == sl.Site(1)
    difference = (a + 3).mean(0) - b.mean(0)
    torch.testing.assert_close(direction, difference / difference.norm())
    assert float(middle) == pytest.approx(float((((a + 3).mean(0) + b.mean(0)) / 2) @ direction), rel=1e-5)


# -- schedules --------------------------------------------------------------------------------------------------


def test_schedule_counts_generated_tokens(case):
    """Factor i in the pass that produces token i: at the last prompt token for i = 0, with a cache and without."""
    controller = sl.caa(case.model, case.data, layers=1, where="all")
    vector = controller.loops[0].law.vector
    scheduled = sl.schedule(controller, [1.0, 0.5, 0.0, 0.25], prompt=2.0)
    expected = [0, 2, 2, 2, 1, 0.5, 0, 0.25, 0.25, 0.25]
    for cache in (True, False):
        with case.steer(controller=scheduled, record="all") as steered:
            case.generate(IDS, cache=cache)
        u = steered.record.layers("u")[1]
        case.close(u, torch.tensor(expected)[None, :, None] * vector, f"u with cache={cache}", factor=3)


def test_schedule_counts_from_each_rows_own_prompt():
    schedule = Schedule(torch.tensor([1.0, 0.5]), prompt=3.0)
    assert schedule.at(torch.tensor([[-2, -1, 0, 1, 7]])).tolist() == [[3.0, 3.0, 1.0, 0.5, 0.5]]


def test_bad_input_is_told(case, prompts):
    controller = sl.caa(case.model, case.data)
    with pytest.raises(TypeError, match="when\\(\\) takes a Controller"):
        sl.when("caa", sl.gate(case.model, prompts))
    with pytest.raises(TypeError, match="when\\(\\) takes gates, it got a Pairs"):
        sl.when(controller, prompts)
    for factors in ([], [float("nan")], [[1.0]]):
        with pytest.raises(ValueError, match="one finite number for each generated token"):
            sl.schedule(controller, factors)
    with pytest.raises(ValueError, match="where='last_prompt' ends with the prompt"):
        sl.schedule(controller.at("last_prompt"), [1.0, 0.5])
    assert sl.schedule(controller.at("last_prompt"), [0.5]).loops[0].schedules
    with pytest.raises(ValueError, match="pool='max'"):
        sl.gate(case.model, prompts, pool="max")
    with pytest.raises(ValueError, match="no layer 99"):
        sl.gate(case.model, prompts, gate_layers=99)
    with pytest.raises(ValueError, match="identical activations at every layer"):
        sl.gate(case.model, sl.Pairs(OPEN, OPEN))
    wrong = sl.Gate(sl.Side(torch.ones(5), torch.tensor(0.0)), [sl.Summary(sl.Site(0))])
    with pytest.raises(ValueError, match="the Side does not fit states of shape"):
        case.steer(controller=sl.when(controller, wrong))
    far = sl.Gate(sl.Side(torch.ones(5), torch.tensor(0.0)), [sl.Summary(sl.Site(99))])
    with pytest.raises(ValueError, match="no hook point"):
        case.steer(controller=sl.when(controller, far))


def test_a_prompt_in_two_parts_is_told(device):
    """The unsteered state of a prompt cannot be had once a part of it has been steered."""
    case = Case("caa", "bridge", device=device)
    gate = sl.gate(case.model, sl.Pairs(OPEN, CLOSED), gate_layers=2)
    controller = sl.when(sl.caa(case.model, case.data, layers=1, where="all"), gate)
    model = case.model.original_model
    out = model(IDS[:1], use_cache=True)
    with pytest.raises(RuntimeError, match="begin with an empty KV cache"), case.steer(controller=controller):
        model(torch.tensor([[9]]), past_key_values=out.past_key_values)


# -- methods ----------------------------------------------------------------------------------------------------


def test_cast_matches_the_closed_form(cold_sadi):
    values, texts = cold_sadi
    h, c = values["micro/cast/h"], values["micro/cast/c"]
    for pooled, key in ((h.mean(1), "mean"), (h[:, -1], "last")):
        expected = values[f"micro/cast/similarity_{key}"]
        for threshold, above, opened in ((0.0, True, 1), (0.9, True, 0), (0.9, False, 1)):
            condition = sl.Resemblance([c], torch.tensor(threshold, dtype=h.dtype), above)
            gate, signals = condition.decide([pooled])
            torch.testing.assert_close(signals["similarity"][0], expected)
            assert gate.tolist() == [opened]
    u, _ = Add(values["micro/cast/behavior"]).act(h, Now())
    torch.testing.assert_close(h + texts["micro/cast/strength"] * u, values["micro/cast/out_if_met"])


def test_inferaligner_matches_the_closed_form(cold_sadi):
    values, texts = cold_sadi
    s = values["micro/inferaligner/s"]  # of other prompts than the two sets that place the boundary
    direction = s / s.norm()
    # minus the mean projection of all prompts: half way between the means of sides of equal size
    middle = sum((values[f"micro/inferaligner/{side}"] @ direction).mean() / 2 for side in ("harmful", "harmless"))
    torch.testing.assert_close(-middle, values["micro/inferaligner/b"])
    h = values["micro/inferaligner/h"]
    gate, _ = sl.Side(direction, middle).decide([h[:, -1]])
    torch.testing.assert_close(gate, values["micro/inferaligner/gate"])
    u, _ = Add(values["micro/inferaligner/theta"]).act(h, Now())
    torch.testing.assert_close(
        h + texts["micro/inferaligner/alpha"] * gate[:, None, None] * u, values["micro/inferaligner/out"]
    )


def test_tda_matches_the_closed_form(cold_sadi):
    values, texts = cold_sadi
    act = values["micro/tda/act"]
    pooled = sl.Summary(sl.Site(0, "mlp_post"), pool="rms").of(act[None], slice(0, 5))
    torch.testing.assert_close(pooled[0] * 5**0.5, values["micro/tda/neuron_l2"])
    law = Dynamic(torch.ones(32, dtype=act.dtype), torch.tensor(texts["micro/tda/eps"] / 5**0.5, dtype=act.dtype))
    u, signals = law.act(act[None], Now(summary=pooled))
    torch.testing.assert_close(act + u[0], act * values["micro/tda/mask"])
    assert float(signals["kept"]()[0, 0]) == pytest.approx(float(values["micro/tda/mask"].double().mean()))


def test_tda_drops_what_carries_little(case):
    """The threshold leaves the error asked for, and generated tokens lose exactly the unused neurons."""
    torch.manual_seed(0)
    a, w = torch.randn(6, 64) ** 3, torch.randn(64, 16)
    bound = tail_threshold(a, w, 0.2)
    sizes = a.abs() * w.norm(dim=-1)

    def tail(threshold):
        dropped = torch.where(sizes < threshold, a, 0.0) @ w
        return float((dropped.norm(dim=-1) / (a @ w).norm(dim=-1)).mean())

    assert tail(bound) <= 0.2 < tail(bound * 1.2)
    controller = sl.tda(case.model, case.data, error=0.3, layers=1)
    with case.steer(controller=controller, record="all") as steered:
        tokens = case.generate(IDS)
    record = steered.record.layers("u")[1]
    assert not record[:, :5].any(), "the prompt was touched"
    host, site = host_of(case.model), sl.Site(1, "mlp_post")
    prompt = host.read(
        IDS.tolist() * 4, [[float(i == t) for i in range(5)] for t in range(1, 5) for _ in range(2)], [site]
    )
    rms = prompt[site].view(4, 2, -1).square().mean(0).sqrt()
    law = controller.loops[0].law
    mask = law.norms * rms > law.threshold
    assert bool((record[:, 5:][mask[:, None].expand_as(record[:, 5:])] == 0).all())
    assert bool((record[:, 5:][~mask[:, None].expand_as(record[:, 5:])] != 0).any())
    assert tokens.shape[1] == 11


def test_inferaligner_tells_its_examples_apart(host, device):
    case = Case("inferaligner", host, device=device)
    controller = case.fit(condition=sl.Pairs(OPEN, CLOSED))
    _, record = run(case, controller, torch.tensor([OPEN[1], CLOSED[1]]))
    for gate in record.layers("gate").values():
        assert gate[:, -1].tolist() == [1.0, 0.0]


def test_cast_decides_as_its_recipe_scores(host, device):
    """The F1 score of the decisions that are made is the one that fitting promises; two gate layers: either."""
    case = Case("cast", host, device=device)
    controller = case.fit(condition=sl.Pairs(OPEN, CLOSED), gate_layers=[0, 3], layers=[1, 2])
    arguments = controller.recipe["found"]
    _, record = run(case, controller, torch.tensor(OPEN + CLOSED))
    opened = record.layers("gate")[1][:, -1] > 0
    similarity = record.layers("similarity")[1][:, -1]
    beyond = similarity > arguments["threshold"] if arguments["above"] else similarity < arguments["threshold"]
    assert torch.equal(opened, beyond)
    hits, false = int(opened[:3].sum()), int(opened[3:].sum())
    assert arguments["f1"] == pytest.approx(2 * hits / (3 + hits + false))
    assert arguments["f1"] >= 0.8
    assert torch.equal(record.layers("gate")[2][:, -1] > 0, opened)


def test_cast_component_is_that_of_rows_centred_in_pairs():
    torch.manual_seed(0)
    positive, negative = torch.randn(7, 5) + 1, torch.randn(7, 5)
    middle = (positive + negative) / 2
    rows = torch.cat([positive - middle, negative - middle]).double()
    v = pairwise_component(positive, negative, sl.Site(0))
    _, vectors = torch.linalg.eigh(rows.T @ rows)
    assert abs(float(v @ vectors[:, -1])) == pytest.approx(1.0, abs=1e-9)
    assert int(((positive - negative).double() @ v > 0).sum()) >= 4


def test_inferaligner_takes_its_vector_from_the_aligned_model(host, device):
    from steerlens.models import tiny

    case = Case("inferaligner", host, device=device)
    aligned = tiny("llama", host=host, seed=1, device=device)
    own, guided = case.fit(layers=1), case.fit(layers=1, aligned=aligned)
    positive = sl.caa(aligned, case.data, layers=1).loops[0].law.vector
    torch.testing.assert_close(guided.loops[0].law.vector, positive)
    assert not torch.allclose(own.loops[0].law.vector, positive)
    with pytest.raises(ValueError, match="their residual streams do not correspond"):
        case.fit(aligned=tiny("gpt2", host=host, device=device, n_layers=2))


def test_bad_input_of_the_methods_is_told(device):
    case = Case("cast", discover_hosts()[0], device=device)
    for options, words in (
        ({"pool": "max"}, "pool='max'"),
        ({"layers": 99}, "no layer 99"),
        ({"condition": sl.Pairs(OPEN, CLOSED[:2])}, "cast's condition needs pairs"),
        ({"condition": sl.Pairs(OPEN, OPEN)}, "identical activations"),
    ):
        with pytest.raises(ValueError, match=words):
            case.fit(**options)
    for error in (0.0, 1.0):
        with pytest.raises(ValueError, match="between 0 and 1"):
            sl.tda(case.model, case.data, error=error)
