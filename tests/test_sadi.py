"""SADI: which elements are chosen, what scaling them does, and the reference numbers of SmolLM2."""

from __future__ import annotations

import pytest
import torch

import steerlens as sl
from steerlens.core import Now
from steerlens.fit.reading import contrast_means
from steerlens.hosts import host_of
from steerlens.laws.scaling import Scale
from steerlens.methods.sadi import top_k
from steerlens.testing import Case, padding

IDS = torch.tensor([[3, 17, 25, 29, 41, 22, 9]])


@pytest.fixture(scope="module")
def case(host, device):
    return Case("sadi", host, device=device)


def elements(controller):
    """The chosen (layer, element) of a controller."""
    return {(loop.act.layer, int(index)) for loop in controller.loops for index in loop.law.mask.flatten().nonzero()}


def test_law_matches_the_closed_form(cold_sadi):
    values, texts = cold_sadi
    law = Scale(values["micro/sadi/mask"])
    u, signals = law.act(values["micro/sadi/a"], Now())
    torch.testing.assert_close(values["micro/sadi/a"] + texts["micro/sadi/delta"] * u, values["micro/sadi/out"])
    assert signals["share"]().shape == u.shape[:2]


def test_a_zero_state_has_share_zero():
    assert float(Scale(torch.ones(4)).act(torch.zeros(1, 1, 4), Now())[1]["share"]()) == 0


@pytest.mark.parametrize("select", ["max", "min", "abs"])
def test_ties_go_by_layer_and_index(select):
    scores = torch.tensor([[0.0, 2.0, 2.0], [2.0, -2.0, 0.0], [2.0, -2.0, 2.0]])
    first = {"max": [1, 2, 3, 6], "min": [0, 4, 5, 7], "abs": [1, 2, 3, 4]}[select]
    mask = top_k(scores, 4, select=select)
    assert mask.flatten().nonzero().flatten().tolist() == first
    assert int(top_k(torch.zeros(30, 9), 17, select=select).sum()) == 17


def test_layer_index_is_right_where_layers_outnumber_heads():
    scores = torch.zeros(30, 9)
    scores[23, 7], scores[4, 8] = 2.0, 1.0
    assert top_k(scores, 2).nonzero().tolist() == [[4, 8], [23, 7]]


def test_layer_std_ranks_a_quiet_layer_beside_a_loud_one():
    scores = torch.tensor([[0.0, 0.1, 0.0, 0.0], [10.0, 11.0, 10.0, 9.0]])
    scores[1] -= 10
    assert top_k(scores, 1).nonzero().tolist() == [[1, 1]]
    assert top_k(scores, 1, normalize="layer_std").nonzero().tolist() == [[0, 1]]
    assert top_k(torch.zeros(2, 4), 1, normalize="layer_std").nonzero().tolist() == [[0, 0]]


@pytest.mark.parametrize("component", ["head", "neuron", "hidden"])
def test_swapping_the_sides_swaps_max_and_min(case, component):
    swapped = sl.Pairs(case.data.negative, case.data.positive)
    options = {"component": component, "n_elements": 3}
    assert elements(sl.sadi(case.model, swapped, select="max", **options)) == elements(
        case.fit(select="min", **options)
    )
    assert elements(sl.sadi(case.model, swapped, select="abs", **options)) == elements(
        case.fit(select="abs", **options)
    )


@pytest.mark.parametrize("component", ["head", "neuron", "hidden"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_steering_multiplies_the_chosen_elements(host, family, component, device):
    case = Case("sadi", host, family=family, device=device)
    controller = case.fit(component=component, n_elements=3, strength=2.0)
    assert len(elements(controller)) == 3
    loop = controller.loops[0]
    with case.steer(controller=controller.only([loop.act.layer]), where="last", record="all") as run:
        case.logits(IDS)
    layer = loop.act.layer
    u, share = run.record.layers("u")[layer], run.record.layers("share")[layer]
    weights = [[float(t == 6) for t in range(7)]]
    x = host_of(case.model).read(IDS.tolist(), weights, [loop.act])[loop.act][0]
    torch.testing.assert_close(u[0, -1].cpu(), 2.0 * loop.law.mask * x, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(share[0, -1].cpu(), (loop.law.mask * x).norm() / x.norm(), rtol=1e-5, atol=1e-7)


def test_heads_are_query_heads_and_act_through_the_head_writes(device):
    """Scaling a head adds delta z_h W_O to the attention output."""
    case = Case("sadi", "bridge", device=device)
    model = case.model
    attention = model.original_model.model.layers[1].self_attn
    heads = host_of(model).n_heads
    assert attention.k_proj.out_features < attention.q_proj.out_features, "a test of shared keys and values needs them"
    mask = torch.zeros(heads, 1)
    mask[heads - 1] = 1
    loop = sl.Loop(Scale(mask), sl.Site(1, "z"), where="all", strength=3.0)
    names = ["blocks.1.attn.hook_z", "blocks.1.hook_attn_out"]
    _, plain = model.run_with_cache(IDS, names_filter=names)
    with sl.steer(model, sl.Controller([loop])):
        _, steered = model.run_with_cache(IDS, names_filter=names)
    width = host_of(model).d_head
    weight = attention.o_proj.weight[:, (heads - 1) * width :]
    expected = 3.0 * plain[names[0]][:, 1:, -1] @ weight.T
    torch.testing.assert_close(steered[names[1]][:, 1:] - plain[names[1]][:, 1:], expected, rtol=1e-4, atol=1e-5)


def test_scaling_a_neuron_equals_scaling_its_activation_function(device):
    case = Case("sadi", "bridge", device=device)
    controller = case.fit(component="neuron", n_elements=5, strength=2.0).at(slice(0, None))
    with case.steer(controller=controller):
        steered = case.logits(IDS)
    handles = []
    try:
        for loop in controller.loops:
            act = case.model.original_model.model.layers[loop.act.layer].mlp.act_fn
            scale = 1 + 2.0 * loop.law.mask
            handles.append(act.register_forward_hook(lambda module, args, out, scale=scale: out * scale))
        direct = case.logits(IDS)
    finally:
        for handle in handles:
            handle.remove()
    case.close(steered, direct, "scaling act(gate)")


def test_last_prompt_is_one_token_also_while_generating(case):
    """Decoding with a cache equals one pass over the whole text in which that token alone is scaled."""
    with case.steer(record="scalars", where="last_prompt") as run:
        tokens = case.generate(IDS, 5)
        record = run.record.copy()
    for share in record.layers("share").values():
        assert (~share.isnan()).nonzero().tolist() == [[0, IDS.shape[1] - 1]]
    with case.steer(where=slice(IDS.shape[1] - 1, IDS.shape[1])):
        whole = case.logits(tokens.clone())  # HookedTransformer generates in inference mode
    assert whole[0, IDS.shape[1] - 1 : -1].argmax(-1).tolist() == tokens[0, IDS.shape[1] :].tolist()


def test_left_padded_rows_equal_single_ones(case):
    pad = case.model.tokenizer.pad_token_id
    short = IDS[:, 3:]
    ids = torch.cat([IDS, torch.cat([torch.full((1, 3), pad), short], dim=1)])
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with case.steer():
        singles = [case.logits(row)[0, -1] for row in (IDS, short)]
        with padding(case.model, "left"):
            batch = case.logits(ids, mask)[:, -1]
    case.close(batch, torch.stack(singles), "left-padded logits", factor=3)


def test_tokens_by_default_are_those_of_the_mode(case):
    places = {mode: {loop.where for loop in case.fit(mode=mode).loops} for mode in ("live", "frozen")}
    assert places == {"live": {"last"}, "frozen": {"last_prompt"}}
    with pytest.raises(TypeError, match="where is a NoneType"):
        sl.caa(case.model, case.data, where=None)


@pytest.mark.parametrize("component", ["head", "neuron", "hidden"])
def test_frozen_states_are_those_of_an_unsteered_pass(case, component):
    """The state of every layer at the last prompt token is the unsteered one, scaled; alone, batched, generating."""
    controller = case.fit(mode="frozen", component=component, n_elements=3, strength=4.0)
    ids = torch.tensor([[3, 17, 25, 29, 41], [7, 30, 31, 32, 33]])
    sites = [loop.act for loop in controller.loops]
    assert [site.layer for site in sites] == list(range(host_of(case.model).n_layers))
    weights = [[0.0] * 4 + [1.0]] * 2
    clean = host_of(case.model).read(ids.tolist(), weights, sites)
    pad = case.model.tokenizer.pad_token_id
    padded, mask = torch.tensor([[pad, *row] for row in ids.tolist()]), torch.ones(2, 6, dtype=torch.long)
    padded[1] = torch.tensor([9, 7, 30, 31, 32, 33])
    mask[0, 0] = 0
    with torch.no_grad(), case.steer(controller=controller, record="all") as run:
        case.logits(ids)
        for loop in controller.loops:
            x = clean[loop.act]
            u = run.record.layers("u")[loop.act.layer][:, -1].cpu()
            expected = (loop.law.factors - 1) * x
            if loop.act == sites[0]:  # before it nothing is steered
                case.close(u, expected, "u at the first layer", factor=3)
        alone = {name: value[:1].clone() for name, value in run.record.items()}
        with padding(case.model, "left"):
            case.logits(padded, mask)
        for name, value in alone.items():
            case.close(run.record[name][:1, 1:].nan_to_num(), value.nan_to_num(), f"padded {name}", factor=10)
        on, record = case.generate(ids), run.record.copy()
        off = case.generate(ids, cache=False)
        assert torch.equal(on, off)
        for name, value in record.items():
            case.close(run.record[name].nan_to_num(), value.nan_to_num(), f"generated {name}", factor=10)


def test_frozen_states_survive_saving(case, tmp_path):
    controller = case.fit(mode="frozen")
    controller.save(tmp_path / "c.safetensors")
    with case.steer(controller=sl.Controller.load(tmp_path / "c.safetensors")):
        loaded = case.logits(IDS)
    with case.steer(controller=controller):
        assert torch.equal(case.logits(IDS), loaded)


@pytest.mark.parametrize("mode", ["live", "frozen"])
def test_strength_zero_is_off_in_both_modes_also_after_another_controller(case, mode):
    """A frozen state differs from the one that another controller has moved, so that its factor must be 0, not s."""
    before = sl.caa(case.model, case.data, layers=0, where="all")
    prompt = torch.tensor([case.prompt])
    with case.steer(controller=before):
        alone = case.logits(prompt)
    with case.steer(controller=before + case.fit(mode=mode, strength=0.0, paper=True)):
        assert torch.equal(case.logits(prompt), alone)


def test_bad_arguments_are_told_before_the_model_runs(case):
    host = host_of(case.model)
    count = host.n_layers * host.n_heads
    for options, words in (
        (
            {"n_elements": count + 1},
            f"n_elements={count + 1}, but there are {count} head elements in {host.n_layers} layers",
        ),
        ({"n_elements": 0}, "n_elements=0"),
        (
            {"component": "hidden", "layers": 1, "n_elements": host.d_model + 1},
            f"there are {host.d_model} hidden elements in 1",
        ),
        ({"component": "heads"}, "component='heads'; it is one of 'head', 'neuron', 'hidden'"),
        ({"component": "head", "point": "resid_post"}, "for component='head' it is one of z"),
        ({"select": "top"}, "select='top'"),
        ({"normalize": "std"}, "normalize='std'"),
        ({"mode": "clean"}, "mode='clean'; it is one of 'live', 'frozen'"),
        ({"mode": "frozen", "where": "all"}, "where='last_prompt'"),
        ({"layers": 99}, "no layer 99"),
    ):
        with pytest.raises(ValueError, match=words):
            case.fit(**options)
    with pytest.raises(ValueError, match="identical activations at every z"):
        sl.sadi(case.model, sl.Pairs([[1, 2, 3]], [[1, 2, 3]]))


# -- reference numbers ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(smol, cold_sadi, device):
    """On the Bridge; that all hosts agree is a promise of the conformance suite."""
    case = Case("sadi", "bridge", device=device, model=smol("bridge"))
    case.data = sl.Pairs(*(cold_sadi[1][f"sadi/train_ids_{side}"] for side in ("true", "false")))
    return case


def assert_logits(case, controller, values, prompts, key):
    """Last-token logits of the prompts at the kept tokens, 2e-3."""
    ids = values["SUB_IDS"].long()
    for row, prompt in enumerate(prompts):
        with case.steer(controller=controller), torch.no_grad():
            logits = case.logits(torch.tensor([prompt]))[0, -1].float().cpu()
        assert (logits[ids] - values[f"{key}/sub"][row]).abs().max() < 2e-3, f"{key}, prompt {row}"
        assert abs(float(logits.logsumexp(-1) - values[f"{key}/lse"][row])) < 2e-3


@pytest.mark.real_model
def test_reference_masks(real, cold_sadi):
    values, _ = cold_sadi
    for component, name, k, select in (
        ("head", "head", 8, "max"),
        ("head", "head", 4, "min"),
        ("neuron", "post", 100, "max"),
    ):
        chosen = elements(real.fit(component=component, n_elements=k, select=select))
        assert chosen == {tuple(pair) for pair in values[f"sadi/top/{name}/{select}"][:k].tolist()}


@pytest.mark.real_model
def test_reference_ranking_by_other_signs(real, cold_sadi):
    host = host_of(real.model)
    points = {"head": "z", "post": "mlp_post"}
    sites = [sl.Site(layer, point) for layer in range(host.n_layers) for point in points.values()]
    positive, negative = contrast_means(host, real.data, sites)
    for name, k, select in (("head", 4, "abs"), ("post", 50, "min"), ("post", 50, "abs")):
        chosen = [site for site in sites if site.point == points[name]]
        scores = torch.stack([positive[site] - negative[site] for site in chosen])
        mask = top_k(scores.mean(-1) if name == "head" else scores, k, select=select)
        expected = cold_sadi[0][f"sadi/top/{name}/{select}"][:k].tolist()
        assert {tuple(pair) for pair in mask.nonzero().tolist()} == {tuple(pair) for pair in expected}


@pytest.mark.real_model
@pytest.mark.parametrize(
    ("name", "k", "strength", "kind"),
    [
        ("head", 4, 4, "live"),
        ("head", 4, 4, "live_all"),
        ("head", 8, 9, "live"),
        ("post", 50, 9, "live"),
        ("head", 4, 4, "reference"),
        ("post", 50, 9, "reference"),
    ],
)
def test_reference_logits(real, cold_sadi, name, k, strength, kind):
    values, texts = cold_sadi
    where = slice(0, None) if kind == "live_all" else "last_prompt"
    component = {"head": "head", "post": "neuron"}[name]
    mode = "frozen" if kind == "reference" else "live"
    controller = real.fit(component=component, n_elements=k, strength=strength, where=where, mode=mode)
    assert_logits(
        real, controller, values, texts["sadi/test_prompt_ids"], f"sadi/logits/{name}/K{k}/d{strength}/{kind}"
    )


@pytest.mark.real_model
@pytest.mark.parametrize(("k", "strength"), [(10, 29), (50, 9)])
def test_reference_logits_of_neurons_chosen_by_act_of_gate(real, cold_sadi, k, strength):
    """The authors rank act(gate); scaling mlp_post steers the same."""
    values, texts = cold_sadi
    mask = torch.zeros(30, 1536)
    mask[tuple(values["sadi/top/act/max"][:k].long().T)] = 1
    loops = [
        sl.Loop(Scale(row), sl.Site(layer, "mlp_post"), where="last_prompt", strength=strength)
        for layer, row in enumerate(mask)
        if row.any()
    ]
    key = f"sadi/logits/act/K{k}/d{strength}/live"
    assert_logits(real, sl.Controller(loops), values, texts["sadi/test_prompt_ids"], key)
