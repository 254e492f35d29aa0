"""COLD-Steer: where and of what the gradient is taken, its algebra, and the reference numbers of SmolLM2."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import steerlens as sl
from steerlens.core import Now
from steerlens.fit.gradients import example_gradients
from steerlens.fit.objectives import labelled, objective
from steerlens.hosts import host_of
from steerlens.laws.feedback import Add
from steerlens.laws.learning import Kernel
from steerlens.testing import Case, snapshot

SITE = sl.Site(1)


@pytest.fixture(scope="module")
def case(host, device):
    return Case("cold_kernel", host, device=device)


def vector(controller):
    """Sum of strength times vector of a unit kernel's loop: what is added."""
    (loop,) = controller.loops
    return loop.strength * loop.law.vector


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def fit(case, data=None, **options):
    return sl.cold_kernel(case.model, data or case.data, **{"layers": 1, "scale": "absolute", "eta": 1.0} | options)


# -- laws and losses --------------------------------------------------------------------------------------------


def test_kernels_match_the_closed_form(cold_sadi):
    values, texts = cold_sadi
    z, g, x, eta = values["micro/cold/Z"], values["micro/cold/G"], values["micro/cold/x"], texts["micro/cold/eta"]
    u, _ = Add(-g.mean(0)).act(x[:, None], Now())
    torch.testing.assert_close(eta * u[:, 0], values["micro/cold/unit"])
    u, _ = Kernel(z, g, len(z)).act(x[:, None], Now())
    torch.testing.assert_close(eta * u[:, 0], values["micro/cold/linear"])


def test_losses_of_label_log_probabilities():
    chosen, rejected = torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([-3.0, -1.5], requires_grad=True)

    def value(loss, **options):
        return objective(loss, **{"beta": 0.1, "reference": None} | options).loss(chosen, rejected)

    assert torch.equal(value("sft"), -chosen)
    assert torch.equal(value("negative_sft"), rejected)
    expected = -torch.log(torch.sigmoid(0.1 * (chosen - rejected)))
    torch.testing.assert_close(value("dpo"), expected)
    with_self = value("dpo", reference="self")
    torch.testing.assert_close(with_self, torch.full((2,), 2.0).log())
    (gradient,) = torch.autograd.grad(with_self.sum(), chosen)
    torch.testing.assert_close(gradient, torch.full((2,), -0.05))


def test_labels_begin_where_prompt_and_text_part(case):
    host = host_of(case.model)
    texts = labelled(sl.Pairs([("w1 w2", " w3 w4")], [("w1 w2", " w5")]), host, "both")
    assert [(text.tokens, text.start) for text in texts] == [([1, 2, 3, 4], 2), ([1, 2, 5], 2)]
    assert texts[0].weights() == [0, 1, 0, 0]
    logits = torch.randn(6, host.d_vocab)  # two of padding
    expected = (logits[1].log_softmax(-1)[3] + logits[2].log_softmax(-1)[4]) / 2
    torch.testing.assert_close(texts[0].log_probability(logits), expected)


# -- the gradient -----------------------------------------------------------------------------------------------


def test_dpo_gradient_is_the_sum_of_both_runs(device):
    """Against autograd through the Hugging Face model, one run at a time, weighed by hand."""
    case = Case("cold_kernel", "bridge", device=device)
    model = case.model.original_model

    def run(text):
        prompt, completion = text
        held = []

        def hook(module, args, output):
            held.append(output if isinstance(output, torch.Tensor) else output[0])

        handle = model.model.layers[1].register_forward_hook(hook)
        logits = model(torch.tensor([prompt + completion])).logits[0]
        handle.remove()
        rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
        level = rows[range(len(completion)), completion].mean()
        (gradient,) = torch.autograd.grad(level, held[0])
        return level.detach(), gradient[0, len(prompt) - 1]

    total, rejected = 0, 0
    for positive, negative in zip(case.data.positive, case.data.negative, strict=True):
        (a, up), (b, down) = run(positive), run(negative)
        weight = -0.1 * torch.sigmoid(-0.1 * (a - b))
        total, rejected = total + weight * (up - down) / 3, rejected - weight * down / 3
    assert relative(-vector(fit(case)), total) < 1e-4
    assert relative(-vector(fit(case, pairs="rejected_only")), rejected) < 1e-4


def test_every_text_has_a_position_of_its_own(case):
    """Pairs fitted together, padded, give the mean of the pairs fitted alone."""
    alone = [vector(fit(case, case.data[i : i + 1])) for i in range(3)]
    for batch in (1, 2, 8):
        together = vector(fit(case, batch=batch))
        assert relative(together, torch.stack(alone).mean(0)) < 1e-4


def test_step_is_linear_in_eta_and_blind_to_order_and_repetition(case):
    u = vector(fit(case))
    assert relative(vector(fit(case, eta=3.0)), 3 * u) < 1e-6
    positive, negative = case.data.positive, case.data.negative
    assert relative(vector(fit(case, sl.Pairs(positive[::-1], negative[::-1]))), u) < 1e-4
    assert relative(vector(fit(case, sl.Pairs(positive * 2, negative * 2))), u) < 1e-4


def test_eta_zero_changes_no_bit(case):
    ids = torch.tensor([[3, 17, 25, 29]])
    plain = case.logits(ids)
    with case.steer(controller=fit(case, eta=0.0), record="all"):
        assert torch.equal(case.logits(ids), plain)


@pytest.mark.parametrize("kernel", ["unit", "linear"])
def test_later_tokens_do_not_change_a_tokens_step(case, kernel):
    controller = fit(case, kernel=kernel, where="all")
    steps = []
    for tail in ([29, 41], [9, 30]):
        with case.steer(controller=controller, record="all") as run, torch.no_grad():
            case.logits(torch.tensor([[3, 17, 25, *tail]]))
        steps.append(run.record.stack("u")[0, 0, :3])
    assert steps[0][1:].abs().max() > 0
    case.close(steps[0], steps[1], "the control of the first three tokens")


def test_fitting_leaves_weights_flags_and_gradients_as_they_were(case):
    def state():
        module = getattr(case.model, "_module", case.model)
        weights = {name: (p.requires_grad, p.grad, p.detach().clone()) for name, p in module.named_parameters()}
        return snapshot(case.model), weights

    def unwilling(chosen, rejected):
        raise RuntimeError("the loss fails on purpose")

    fit(case)  # a first pass completes the model
    hooks, weights = state()
    fit(case)
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(case, loss=unwilling)
    hooks_after, weights_after = state()
    assert hooks_after == hooks
    for name, (flag, gradient, value) in weights.items():
        assert weights_after[name][0] == flag
        assert gradient is weights_after[name][1] is None
        assert torch.equal(value, weights_after[name][2])


@pytest.mark.parametrize("kernel", ["unit", "linear"])
def test_relative_scale_is_a_fraction_of_the_state(case, kernel):
    controller = fit(case, scale="relative", eta=0.25, kernel=kernel, layers=[0, 2])
    host = host_of(case.model)
    texts = labelled(case.data, host, "both")
    sites = controller.sites
    read = host.read([text.tokens for text in texts], [text.weights() for text in texts], sites)
    for loop in controller.loops:
        x = read[loop.act]
        u = loop.strength * loop.law.act(x[:, None], Now())[0][:, 0]
        torch.testing.assert_close(u.norm(dim=-1).mean(), 0.25 * x.norm(dim=-1).mean(), rtol=1e-5, atol=0)


def test_a_step_lowers_the_loss(case):
    """Steering the fitting texts themselves before their labels: to first order the loss falls by eta |v|^2."""
    data = sl.Pairs([case.data.positive[0]], [case.data.negative[0]])
    prompt, completion = data.positive[0]
    ids = torch.tensor([prompt + completion])
    at = len(prompt) - 1
    levels = []
    for eta in (0.0, 1e-2):
        controller = fit(case, data, loss="sft", eta=eta, where=slice(at, at + 1))
        with torch.no_grad(), case.steer(controller=controller):
            rows = case.logits(ids)[0, at:-1].log_softmax(-1)
        levels.append(-float(rows[range(len(completion)), completion].mean()))
    fall = 1e-2 * float(vector(fit(case, data, loss="sft")).square().sum())
    assert fall > 0
    assert levels[0] - levels[1] == pytest.approx(fall, rel=0.1)


def test_a_layers_step_does_not_depend_on_the_others_fitted_with_it(case):
    both = fit(case, layers=[0, 1])
    for loop in both.loops:
        assert relative(loop.strength * loop.law.vector, vector(fit(case, layers=loop.act.layer))) < 1e-5


def test_the_step_of_a_distance_is_the_mean_difference(case):
    """With L = -|x+ - x-|^2 / 2 the unit kernel at x+ is the vector of caa."""
    caa = sl.caa(case.model, case.data, layers=1).loops[0].law.vector
    sides = case.data.sides(host_of(case.model))
    x, other = (host_of(case.model).read(side.tokens, side.weights, [SITE])[SITE] for side in sides)
    x.requires_grad_()
    (g,) = torch.autograd.grad(-0.5 * (x - other).square().sum(), x)
    u, _ = Kernel(torch.ones(3, 1), g, 3).act(torch.ones(1, 1, 1), Now())
    torch.testing.assert_close(u[0, 0], caa, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_is_fitted_in_float32(host, dtype, case, device):
    half = Case("cold_kernel", host, dtype=dtype, device=device)
    u = vector(fit(half))
    assert u.dtype == torch.float32
    assert relative(u, vector(fit(case))) < 0.1, "eight bits of mantissa"


def test_a_callable_loss_equals_the_named_one(case):
    def mine(chosen, rejected):
        return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected))

    assert relative(vector(fit(case, loss=mine)), vector(fit(case))) < 1e-6
    assert fit(case, loss=mine).recipe["arguments"]["loss"] == "mine"


def test_bad_input_is_told_before_the_model_runs(case):
    a, b = ([5, 9], [12, 31]), ([5, 9], [13])
    for data, options, words in (
        (sl.Pairs([[5, 9]], [[5, 8]]), {}, "no label tokens"),
        (sl.Pairs([([5, 9], [])], [b]), {"loss": "sft"}, "no label tokens"),
        (sl.Pairs([([], [5, 9])], [b]), {"loss": "sft"}, "no prompt token"),
        (sl.Pairs([a], [([5, 8], [13])]), {}, "pair 0 has two different prompts"),
        (sl.Pairs([a, a], [b]), {}, "there are 2 and 1 texts"),
        (case.data, {"loss": "ppo"}, "loss='ppo'; it is one of dpo, negative_sft, sft"),
        (case.data, {"reference": "other"}, "reference='other'"),
        (case.data, {"pairs": "both"}, "pairs='both'"),
        (case.data, {"pairs": "rejected_only", "loss": "sft"}, "no rejected run"),
        (case.data, {"kernel": "rbf"}, "kernel='rbf'"),
        (case.data, {"scale": "mean"}, "scale='mean'"),
        (case.data, {"loss": lambda chosen, rejected: chosen.mean()}, "not one number for each example"),
    ):
        with pytest.raises(ValueError, match=words):
            fit(case, data, **options)
    with pytest.raises(TypeError, match="data is a list"):
        fit(case, [a])


def test_weights_that_are_elsewhere_are_told(device):
    pytest.importorskip("nnsight")
    case = Case("cold_kernel", "nnsight", device=device)
    case.model._module.to("meta")
    with pytest.raises(NotImplementedError, match="taking gradients needs the weights here"):
        fit(case)


# -- reference numbers ------------------------------------------------------------------------------------------


def assert_logits(case, controller, cold_sadi, key, rows):
    """Last-token logits of some prompts at the kept tokens, 2e-3."""
    values, texts = cold_sadi
    ids = values["SUB_IDS"].long()
    for row in rows:
        with case.steer(controller=controller), torch.no_grad():
            logits = case.logits(torch.tensor([texts["cold/test_ids"][row]]))[0, -1].float().cpu()
        assert (logits[ids] - values[f"{key}/sub"][row]).abs().max() < 2e-3, f"{key}, prompt {row}"
        assert abs(float(logits.logsumexp(-1) - values[f"{key}/lse"][row])) < 2e-3


@pytest.fixture(scope="module")
def real(smol, cold_sadi, device):
    """On the Bridge; that all hosts agree is a promise of the conformance suite."""
    case = Case("cold_kernel", "bridge", device=device, model=smol("bridge"))
    items = cold_sadi[1]["cold/ab_items"]
    pairs = [[(ids[: at[0]], ids[at[0] :]) for ids, at in (item[:2], item[2:])] for item in items]
    # what follows the letter is no label
    pairs = [[(prompt, completion[:1]) for prompt, completion in pair] for pair in pairs]
    case.data = sl.Pairs([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    return case


@pytest.fixture(scope="module")
def gradients(real, cold_sadi):
    """Gradients by loss, at all sites of the reference numbers, each computed once."""

    @cache
    def compute(loss):
        aim = objective(loss, beta=0.1, reference=None)
        sites = [sl.Site(layer) for layer in cold_sadi[1]["cold/v_rows"]]
        return example_gradients(host_of(real.model), real.data, aim, sites)[1]

    return compute


@pytest.mark.real_model
def test_a_token_that_spans_the_seam_is_a_label(real):
    """The tokenizer merges "sta" and "tion", so that the prompt alone has tokens that the text has not."""
    host = host_of(real.model)
    (text,) = labelled(sl.Pairs([("We met at the sta", "tion")], ["-"]), host, "positive")
    words = [host.tokenizer.decode([token]) for token in text.tokens]
    assert words[text.start :] == [" station"]
    assert text.weights() == [0, 0, 0, 1, 0]


@pytest.mark.real_model
def test_reference_gradients(gradients, cold_sadi):
    values, texts = cold_sadi
    for row, layer in enumerate(texts["cold/v_rows"]):
        site = sl.Site(layer)
        sft, dpo = gradients("sft")[site], gradients("dpo")[site]
        assert relative(sft.mean(0), values["cold/ab/sft/v_pref_by_layer"][row]) < 1e-3
        assert relative(dpo[::2].mean(0), values["cold/ab/dpo/v_pref_by_layer"][row]) < 1e-3
        assert relative(dpo[1::2].mean(0), values["cold/ab/dpo/v_rejonly_by_layer"][row]) < 1e-3
        assert relative(dpo.sum(0) / 8, values["cold/ab/dpo/v_sum_by_layer"][row]) < 1e-3


@pytest.mark.real_model
def test_reference_gradients_with_a_reference(real, cold_sadi):
    aim = objective("dpo", beta=0.1, reference="self")
    found = example_gradients(host_of(real.model), real.data[:2], aim, [sl.Site(14)])[1][sl.Site(14)]
    assert relative(found[::2], cold_sadi[0]["cold/ab/dpo_ref/per_example_pref_l15"]) < 1e-3


@pytest.mark.real_model
@pytest.mark.parametrize(
    ("key", "where"), [("sft/eta50", "all"), ("dpo_sum/eta1000", "last"), ("dpo_rejonly/eta1000", "all")]
)
def test_reference_logits(real, gradients, cold_sadi, key, where):
    """The paper's layer 15 is the output of block 14."""
    g = gradients(key[:3])[sl.Site(14)]
    v = g[1::2].mean(0) if "rejonly" in key else g.sum(0) / 8
    loop = sl.Loop(
        Add(-v), sl.Site(14), where=slice(0, None) if where == "all" else where, strength=float(key.partition("eta")[2])
    )
    stem = f"cold/logits/kernel_unit/{key}/{where}"
    assert_logits(real, sl.Controller([loop]), cold_sadi, stem, rows=[1])


#: Prompt, and six greedy tokens with the sft step at eta = 50 after block 14: in the prompt only, and at every step.
GENERATED = [
    (
        [10219, 42, 1073, 536, 346, 1407, 563, 260, 4167, 4339, 47, 198, 12463, 42],
        [339, 5248, 8916, 563, 260, 14561],
        [339, 5248, 8916, 563, 260, 14561],
    ),
    (
        [10219, 42, 17269, 549, 563, 469, 3444, 288, 746, 30, 198, 12463, 42],
        [198, 198, 18, 57, 5248, 588],
        [198, 198, 57, 5248, 588, 18948],
    ),
]


@pytest.mark.real_model
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize(("prompt", "in_prompt", "at_every_step"), GENERATED)
def test_reference_generations(real, gradients, prompt, in_prompt, at_every_step, everywhere):
    v = gradients("sft")[sl.Site(14)].mean(0)
    where = slice(0, None) if everywhere else slice(0, len(prompt))
    controller = sl.Controller([sl.Loop(Add(-v), sl.Site(14), where=where, strength=50.0)])
    with real.steer(controller=controller):
        tokens = real.generate(torch.tensor([prompt]), 6)
    assert tokens[0, len(prompt) :].tolist() == (at_every_step if everywhere else in_prompt)
