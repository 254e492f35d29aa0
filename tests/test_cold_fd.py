"""COLD-Steer with the learning dynamics: against a real gradient step, and the reference numbers of SmolLM2."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

import steerlens as sl
from steerlens.core import Direction
from steerlens.hosts import host_of
from steerlens.testing import Case, discover_hosts, padding, snapshot

HOSTS = [host for host in discover_hosts() if host != "hooked"]
PROMPT = [3, 17, 25, 29, 41, 22, 9]


@pytest.fixture(scope="module", params=HOSTS)
def case(request, device):
    return Case("cold_fd", request.param, device=device)


@pytest.fixture(scope="module")
def bridge(device):
    return Case("cold_fd", "bridge", device=device)


def fit(case, data=None, **options):
    return sl.cold_fd(case.model, data or case.data, **{"layers": 1, "scale": "absolute", "eta": 1.0} | options)


def controls(case, controller, ids, mask=None, **options):
    """Recorded u by layer."""
    with torch.no_grad(), case.steer(controller=controller, record="all", **options) as run:
        case.logits(ids, mask)
    return {layer: value.clone() for layer, value in run.record.layers("u").items()}


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_control_is_the_first_order_change_of_a_real_step(device):
    """Against the model with its parameters really moved: halving the step halves the relative error."""
    case = Case("cold_fd", "bridge", dtype=torch.float64, family="gpt2", device=device)
    ids = torch.tensor([PROMPT])
    controller = sl.cold_fd(case.model, case.data, layers=1, scale="absolute", eta=1.0, where=slice(0, None))
    u = controls(case, controller, ids)[1]
    errors = []
    for eta in (1e-2, 5e-3, 2.5e-3):
        direction, norm = controller.loops[0].tangent, float(controller.loops[0].law.norm)
        base = case.model.original_model.transformer
        parameters = {
            name.replace("_original_component.", ""): (name, value) for name, value in base.named_parameters()
        }
        states = []
        for step in (eta, 0.0):
            changed = {
                parameters[name][0]: parameters[name][1].detach() - step * norm * value
                for name, value in zip(direction.names, direction.values, strict=True)
            }
            found = []
            handle = base.h[1].register_forward_hook(
                lambda module, args, out, found=found: found.append(out if isinstance(out, torch.Tensor) else out[0])
            )
            with torch.no_grad():
                functional_call(base, changed, (ids,))
            handle.remove()
            states.append(found[0])
        errors.append(relative(u, (states[0] - states[1]) / eta))
    assert errors[0] < 0.05
    assert errors[1] / errors[0] == pytest.approx(0.5, abs=0.1)
    assert errors[2] / errors[1] == pytest.approx(0.5, abs=0.1)


def test_finite_differences_agree_with_the_derivative(case):
    ids = torch.tensor([PROMPT])
    exact = controls(case, fit(case), ids)[1]
    assert relative(controls(case, fit(case, estimator="fd"), ids)[1], exact) < 2e-2


@pytest.mark.parametrize("host", HOSTS)
def test_finite_differences_in_float64(host, device):
    case = Case("cold_fd", host, family="gpt2", dtype=torch.float64, device=device)
    ids = torch.tensor([PROMPT])
    exact = controls(case, fit(case, where="all"), ids)[1]
    assert relative(controls(case, fit(case, where="all", estimator="fd"), ids)[1], exact) < 1e-5


def test_two_layers_take_their_controls_from_one_unsteered_pass(case):
    ids = torch.tensor([PROMPT])
    both = controls(case, fit(case, layers=[0, 2]), ids)
    for layer in (0, 2):
        # blocks behind the last steered one have a gradient, but no effect
        assert relative(both[layer], controls(case, fit(case, layers=layer), ids)[layer]) < 1e-5


def test_step_is_linear_in_eta_and_blind_to_order_and_repetition(case):
    ids = torch.tensor([PROMPT])
    u = controls(case, fit(case), ids)[1]
    assert relative(controls(case, fit(case, eta=3.0), ids)[1], 3 * u) < 1e-5
    positive, negative = case.data.positive, case.data.negative
    for data in (sl.Pairs(positive[::-1], negative[::-1]), sl.Pairs(positive * 2, negative * 2)):
        assert relative(controls(case, fit(case, data), ids)[1], u) < 1e-4


def test_a_token_does_not_feel_later_ones(case):
    u = controls(case, fit(case, where="all"), torch.tensor([PROMPT]))[1]
    other = controls(case, fit(case, where="all"), torch.tensor([[*PROMPT[:4], 30, 31, 32]]))[1]
    assert relative(other[:, 1:4], u[:, 1:4]) < 1e-5


def test_padding_does_not_change_it(case):
    pad = case.model.tokenizer.pad_token_id
    u = controls(case, fit(case), torch.tensor([PROMPT]))[1]
    ids = torch.tensor([[pad, pad, *PROMPT], [*PROMPT, 30, 31]])
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with padding(case.model, "left"):
        batched = controls(case, fit(case), ids, mask)[1]
    assert relative(batched[:1, 2:], u) < 1e-4


def test_generated_tokens_have_a_cache_of_their_own(case):
    """At every decoding step the control is that of one pass over the whole sequence, unsteered."""
    ids = torch.tensor([PROMPT, PROMPT[::-1]])
    controller = fit(case, layers=[0, 1], where="all", eta=0.01)
    with case.steer(controller=controller, record="all") as run:
        tokens = case.generate(ids)
        while_decoding = run.record.copy().layers("u")
    for layer, whole in controls(case, controller, tokens[:, :-1]).items():
        case.close(while_decoding[layer], whole, f"u at layer {layer}", factor=20)


def test_a_cache_that_was_filled_before_steering_is_told(bridge):
    model, ids = bridge.model, torch.tensor([PROMPT])
    out = model.original_model(ids, use_cache=True)
    with (
        pytest.raises(RuntimeError, match="tangents of 7 earlier tokens are not known"),
        bridge.steer(controller=fit(bridge, where="all")),
    ):
        model.original_model(torch.tensor([[9]]), past_key_values=out.past_key_values)


def test_parameters_are_left_alone(case):
    before = snapshot(case.model)
    module = getattr(case.model, "_module", None) or case.model.original_model
    flags = [(p.requires_grad, p.grad) for p in module.parameters()]
    controller = fit(case)
    controls(case, controller, torch.tensor([PROMPT]))
    with pytest.raises(ZeroDivisionError), case.steer(controller=controller):
        raise ZeroDivisionError
    assert snapshot(case.model) == before
    assert [(p.requires_grad, p.grad) for p in module.parameters()] == flags


def test_frozen_parameters_do_not_matter(device):
    case = Case("cold_fd", "bridge", device=device)
    ids = torch.tensor([PROMPT])
    u = controls(case, fit(case), ids)[1]
    case.model.original_model.requires_grad_(False)
    assert torch.equal(controls(case, fit(case), ids)[1], u)


def test_relative_scale_is_a_fraction_of_the_state(case):
    controller = fit(case, scale="relative", eta=0.25, layers=[0, 2], where=slice(0, None))
    lengths = []
    for sides in zip(case.data.positive, case.data.negative, strict=True):
        for prompt, completion in sides:
            ids = torch.tensor([list(prompt) + list(completion)])
            u = controls(case, controller, ids)
            lengths.append([float(value[0, len(prompt) - 1].norm()) for value in u.values()])
    sites = controller.sites
    read = [
        host_of(case.model).read(
            [prompt + completion for prompt, completion in side],
            [
                [float(i == len(prompt) - 1) for i in range(len(prompt) + len(completion))]
                for prompt, completion in side
            ],
            sites,
        )
        for side in (case.data.positive, case.data.negative)
    ]
    for index, site in enumerate(sites):
        x = torch.cat([side[site] for side in read]).norm(dim=-1).mean()
        assert sum(row[index] for row in lengths) / len(lengths) == pytest.approx(0.25 * float(x), rel=1e-4)


def test_one_direction_is_saved_once(case, tmp_path):
    controller = fit(case, layers=[0, 1, 2])
    size = sum(value.numel() * value.element_size() for value in controller.loops[0].tangent.values)
    assert controller.nbytes < 1.01 * size + 100
    controller.save(tmp_path / "c.safetensors")
    assert (tmp_path / "c.safetensors").stat().st_size < size + 50_000
    loaded = sl.Controller.load(tmp_path / "c.safetensors")
    ids = torch.tensor([PROMPT])
    assert torch.equal(controls(case, loaded, ids)[2], controls(case, controller, ids)[2])


def test_bad_input_is_told(case):
    for options, words in (
        ({"estimator": "entk"}, "estimator='entk'; it is one of 'auto', 'jvp', 'fd'"),
        ({"embedding": "both"}, "embedding='both'"),
        ({"scale": "mean"}, "scale='mean'"),
        ({"loss": "ppo"}, "loss='ppo'"),
    ):
        with pytest.raises(ValueError, match=words):
            fit(case, **options)


# -- reference numbers ------------------------------------------------------------------------------------------


#: Blocks whose outputs the reference tangents are of.
DZ_ROWS = [4, 9, 14, 19, 29]


@pytest.fixture(scope="module")
def real(smol, cold_sadi, device):
    case = Case("cold_fd", "bridge", device=device, model=smol("bridge"))
    pairs = []
    for item in cold_sadi[1]["cold/ab_items"]:
        # what follows the letter is no label
        pairs.append([(ids[: at[0]], ids[at[0] : at[0] + 1]) for ids, at in (item[:2], item[2:])])
    case.data = sl.Pairs([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    return case


@pytest.mark.real_model
@pytest.mark.parametrize(
    ("loss", "runs"),
    [
        ("dpo", [(0.1, "last", [14]), (0.1, "all", [14]), (0.05, "last", [9, 14])]),
        ("sft", [(0.002, "last", [14])]),
    ],
)
def test_reference_steps(real, cold_sadi, loss, runs):
    """Tangents at the last token of three prompts, and the steered logits; the paper's layer 15 is block 14."""
    values, texts = cold_sadi
    rows = DZ_ROWS
    controller = sl.cold_fd(real.model, real.data, loss=loss, layers=rows, scale="absolute", eta=1.0, where="last")
    prompts = texts["cold/test_ids"]
    for number, prompt in enumerate(prompts):
        # held: nothing is added, so that one pass shows the unsteered tangents of all layers
        u = controls(real, controller * 1e-12, torch.tensor([prompt]))
        for row, layer in enumerate(rows):
            dz = -u[layer][0, -1] * 1e12
            assert relative(dz, values[f"cold/ab/{loss}/dz_last"][number, row]) < 1e-3, f"layer {layer}"
    ids = values["SUB_IDS"].long()
    for eta, where, layers in runs:
        key = f"cold/logits/fd_exact/{loss}/eta{eta}/{where}" + ("/layers10+15" if len(layers) == 2 else "")
        chosen = (controller.only(layers) * eta).at(slice(0, None) if where == "all" else where)
        with real.steer(controller=chosen), torch.no_grad():
            logits = real.logits(torch.tensor([prompts[1]]))[0, -1].float().cpu()
        assert (logits[ids] - values[f"{key}/sub"][1]).abs().max() < 5e-3, key
        assert abs(float(logits.logsumexp(-1) - values[f"{key}/lse"][1])) < 5e-3, key


@pytest.mark.real_model
def test_reference_tangents_of_parts_of_the_parameters(real, cold_sadi):
    """The embedding's input use alone, no embedding, and every position of a prompt, position 0 included."""
    values, texts = cold_sadi
    controller = fit(real, layers=14, loss="dpo", embedding="untied")
    whole, norm = controller.loops[0].tangent, float(controller.loops[0].law.norm)
    inner = [(name, value) for name, value in zip(whole.names, whole.values, strict=True) if "embed" not in name]
    learner, site = host_of(real.model).learner(), sl.Site(14)
    prompts = texts["cold/test_ids"]
    last = [[float(position == len(prompt) - 1) for position in range(len(prompt))] for prompt in prompts]
    for name, direction in (("untied", whole), ("blocks", Direction(*zip(*inner, strict=True)))):
        dz = norm * learner.tangents(prompts, last, [site], direction)[site]
        assert relative(dz, values[f"cold/ab/dpo/dz_l15/{name}"]) < 1e-3, name
    rows = range(0, len(prompts[0]), 5)
    each = [[float(position == row) for position in range(len(prompts[0]))] for row in rows]
    dz = norm * learner.tangents([prompts[0]] * len(each), each, [site], whole, batch=12)[site]
    for row, expected in zip(dz, values["cold/ab/dpo/dz_l15/every5"], strict=True):
        assert relative(row, expected) < 1e-3
