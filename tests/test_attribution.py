"""Who did it: leaving out and gradients against runs made by hand, on every host; shares against sums and patches."""

from __future__ import annotations

import pytest
import torch

import steerlens as sl
from steerlens.diagnose import attribute, carriers, direct, logit_difference
from steerlens.diagnose.direct import _gauss_legendre
from steerlens.hosts import host_of
from steerlens.testing import Case, discover_hosts, discover_methods, snapshot

PROMPTS = [[3, 17, 25, 29, 41, 22, 9], [7, 30, 31, 32, 33]]
LENS = [host for host in discover_hosts() if host != "nnsight"]


def metric(logits):
    return logits[:, -1, :20].logsumexp(-1) - logits[:, -1, 20:40].logsumexp(-1)


def metric_of(case, controller, ids):
    with torch.no_grad(), case.steer(controller=controller):
        return float(metric(case.logits(torch.tensor([ids]))))


@pytest.fixture(params=discover_hosts())
def case(request):
    return Case("lqr", request.param, options={"paper": True})


def layered(case):
    """Two loops at one layer, loops at others, one that acts on heads and one with memory."""
    vector = torch.linspace(-1, 1, 32)
    heads = sl.Loop(sl.Add(vector.view(4, 8)), sl.Site(1, "z"), where="all", name="heads")
    branch = sl.Loop(sl.Add(vector), sl.Site(2, "mlp_out"), where="last", name="branch")
    memory = Case("pid", case.host, options={"paper": True}).controller
    return case.controller + memory * 0.3 + sl.Controller([heads, branch])


def without(controller, chosen):
    loops = [loop.replace(strength=0.0) if chosen(index, loop) else loop for index, loop in enumerate(controller.loops)]
    return sl.Controller(loops, controller.recipe)


# -- attribute -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["layer", "loop"])
def test_leaving_out_is_what_runs_by_hand_show(case, by):
    controller = layered(case)
    before = snapshot(case.model)
    result = attribute(case.model, controller, metric, PROMPTS, by=by, batch=3)
    assert snapshot(case.model) == before
    for row, ids in enumerate(PROMPTS):
        whole = metric_of(case, controller, ids)
        assert float(result.steered[row]) == pytest.approx(whole, abs=2e-5)
        assert float(result.unsteered[row]) == pytest.approx(metric_of(case, controller * 0, ids), abs=2e-5)
        for part, label in enumerate(result.labels):

            def chosen(index, loop, label=label):
                return str(loop.act.layer) == label if by == "layer" else label.startswith(f"{index}:")

            expected = whole - metric_of(case, without(controller, chosen), ids)
            assert float(result.effects[row, part]) == pytest.approx(expected, abs=4e-5), label
    assert result.total == pytest.approx(float((result.steered - result.unsteered).mean()))
    assert float(result.effect.sum()) + result.interaction == pytest.approx(result.total)
    assert list(result.table().columns) == ["layer", "exact", "gradient"]


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
@pytest.mark.parametrize("others", ["react", "held"])
def test_every_host_attributes_alike(family, others):
    results = []
    for host in discover_hosts():
        case = Case("lqr", host, family=family, options={"paper": True})
        results.append(attribute(case.model, case.controller, metric, PROMPTS, others=others))
    for other in results[1:]:
        scale = max(1.0, float(results[0].estimates.abs().max()))
        torch.testing.assert_close(other.effects, results[0].effects, rtol=0, atol=1e-4)
        torch.testing.assert_close(other.estimates, results[0].estimates, rtol=0, atol=1e-3 * scale)


@pytest.mark.parametrize("others", ["react", "held"])
def test_the_estimate_is_the_derivative_of_leaving_out(others, case):
    """Central differences of the metric in one layer's strength, the others reacting or replayed."""
    case = Case("lqr", case.host, family="gpt2", dtype=torch.float64, options={"paper": True})
    controller, ids = case.controller, PROMPTS[0]
    if others == "held":
        with torch.no_grad(), case.steer(record="all") as run:
            case.logits(torch.tensor([ids]))
            controls = run.record.layers("u")
        loops = [sl.Loop(sl.Add(u[0, -1]), sl.Site(layer), where="last") for layer, u in controls.items()]
        controller = sl.Controller(loops, controller.recipe)
    result = attribute(case.model, case.controller, metric, [ids], others=others, exact=False)
    assert result.effects.isnan().all()
    step = 1e-4
    for part, layer in enumerate(result.layers):
        values = []
        for sign in (1, -1):
            loops = [
                loop.replace(strength=1 + sign * step) if loop.act.layer == layer else loop for loop in controller.loops
            ]
            values.append(metric_of(case, sl.Controller(loops, controller.recipe), ids))
        # laws compute in float64 here; the factors are single numbers
        expected = (values[0] - values[1]) / (2 * step)
        assert float(result.estimates[0, part]) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("host", LENS)
def test_the_estimate_is_the_gradient_at_the_signals_hook_point_times_the_signal(host):
    case = Case("lqr", host, options={"paper": True})
    result = attribute(case.model, case.controller, metric, PROMPTS[:1], exact=False)
    kept = {}

    def keep(u, hook):
        u = u if u.requires_grad else u.requires_grad_()
        kept[len(kept)] = u
        return u

    names = [f"blocks.{layer}.hook_steer_u" for layer in case.controller.layers]
    with torch.enable_grad(), case.steer():
        logits = case.model.run_with_hooks(torch.tensor(PROMPTS[:1]), fwd_hooks=[(name, keep) for name in names])
        gradients = torch.autograd.grad(metric(logits).sum(), list(kept.values()))
    expected = torch.stack([(g * u).sum() for g, u in zip(gradients, kept.values(), strict=True)]).detach().double()
    torch.testing.assert_close(result.estimates[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", discover_methods())
def test_every_method_can_be_taken_apart(method):
    """With laws that gate, remember, look at the prompt or differentiate: sums as stated, shares that add up."""
    case = Case(method, discover_hosts()[0])
    controller = case.controller
    if all(loop.where == "generated" for loop in controller.loops):
        with pytest.raises(ValueError, match="no loop acts on a token of the prompt"):
            attribute(case.model, controller, metric, PROMPTS)
        controller = controller.at("last")
    case.logits(torch.tensor(PROMPTS[:1]))  # a Bridge hooks some norms in their first pass
    before = snapshot(case.model)
    for others in ("react", "held"):
        result = attribute(case.model, controller, metric, PROMPTS, others=others)
        assert result.estimates.isfinite().all()
        assert float(result.effect.sum()) + result.interaction == pytest.approx(result.total)
        if len(result.labels) == 1:
            # one part is the whole
            assert abs(result.interaction) < 1e-6
    shares = direct(case.model, controller, metric, PROMPTS, nodes=16)
    assert float(shares.rest.abs().max()) < 2e-5 * max(1.0, float(shares.values.abs().sum(1).max()))
    assert snapshot(case.model) == before


def test_what_is_linear_is_additive(case):
    """A metric that is linear in a control has no interaction, and its gradient is exact."""
    last = host_of(case.model).n_layers - 1
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)) * 1e-3
    loops = [
        sl.Loop(sl.Add(v), sl.Site(last, point), name=point)
        for v, point in zip(vectors, ("mlp_out", "resid_post"), strict=True)
    ]
    result = attribute(case.model, sl.Controller(loops), metric, PROMPTS, by="loop")
    scale = float(result.effects.abs().max())
    assert abs(result.interaction) < 2e-2 * scale
    assert result.correlation > 0.999


def test_attribution_refuses_what_it_cannot_do(case):
    model, controller = case.model, case.controller
    with pytest.raises(ValueError, match="by='head'"):
        attribute(model, controller, metric, PROMPTS, by="head")
    with pytest.raises(ValueError, match="at least one text"):
        attribute(model, controller, metric, [])
    with pytest.raises(ValueError, match="at least one text"):
        attribute(model, controller, metric, "w1 w2")
    with pytest.raises(ValueError, match="no loops"):
        attribute(model, sl.Controller([]), metric, PROMPTS)
    with pytest.raises(ValueError, match="1 metrics for 2 prompts"):
        attribute(model, controller, [metric], PROMPTS)
    with pytest.raises(ValueError, match="one number"):
        attribute(model, controller, lambda logits: logits[:, -1], PROMPTS)
    with pytest.raises(ValueError, match="2 tokens"):
        logit_difference(model, "w1 w2", "w3")
    other = sl.Controller(controller.loops, controller.recipe | {"model": controller.recipe["model"] | {"d_vocab": 5}})
    with pytest.raises(ValueError, match="another model"):
        attribute(model, other, metric, PROMPTS)
    before = snapshot(model)

    def fail(logits):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        attribute(model, controller, fail, PROMPTS)
    assert snapshot(model) == before


def test_logit_difference_reads_the_last_token(case):
    difference = logit_difference(case.model, ["w1", 2], "w3")
    logits = torch.randn(2, 4, 100)
    torch.testing.assert_close(difference(logits), (logits[:, -1, 1] + logits[:, -1, 2]) / 2 - logits[:, -1, 3])
    result = attribute(case.model, case.controller, [difference, logit_difference(case.model, 5, 6)], PROMPTS)
    assert "'w1' 2 minus 'w3'" in result.metric
    layout = result.plot().layout
    assert (layout.xaxis.title.text, layout.yaxis.title.text) == ("layer", "effect (units of the metric)")
    assert result.metric in layout.title.text


# -- carriers ------------------------------------------------------------------------------------------------------

POINTS = {"head": "z", "neuron": "mlp_post", "attn": "attn_out", "mlp": "mlp_out"}


@pytest.mark.parametrize("kind", POINTS)
@pytest.mark.parametrize("host", LENS)
def test_a_check_is_activation_patching_by_hooks(host, kind):
    """Exact patches through TransformerLens's own hooks; the estimates correlate with them, and equal nnsight's."""
    case = Case("caa", host)
    result = carriers(case.model, case.controller * 0.2, metric, PROMPTS, components=kind, check=4)
    for index in result.top(4):
        layer, unit, losses = result.layers[index], result.units[index], []
        name = str(sl.Site(layer, POINTS[kind]))
        for ids in map(torch.tensor, PROMPTS):
            with torch.no_grad():
                _, cache = case.model.run_with_cache(ids[None])

                def patch(x, hook, own=cache[name], unit=unit):
                    return torch.cat([x[:, :, :unit], own[:, :, unit : unit + 1], x[:, :, unit + 1 :]], dim=2)

                def whole(x, hook, own=cache[name]):
                    return own

                with case.steer(controller=case.controller * 0.2):
                    steered = metric(case.model(ids[None]))
                    hook = patch if kind in ("head", "neuron") else whole
                    losses.append(
                        float(steered - metric(case.model.run_with_hooks(ids[None], fwd_hooks=[(name, hook)])))
                    )
        assert float(result.exact[index]) == pytest.approx(sum(losses) / len(losses), abs=2e-5)
    assert result.exact.isnan().sum() == len(result.kinds) - min(4, len(result.kinds))
    assert result.correlation > 0.9
    torch.testing.assert_close(result.rest, torch.zeros_like(result.rest), rtol=0, atol=1e-4)
    if "nnsight" in discover_hosts():
        other = carriers(case.other(host="nnsight").model, case.controller * 0.2, metric, PROMPTS, components=kind)
        torch.testing.assert_close(other.values, result.values, rtol=0, atol=1e-4)


@pytest.mark.lens3
def test_features_of_an_sae():
    """Shares of an SAE's features and its error add up; a check takes one feature's change back through the decoder."""
    sae_lens = pytest.importorskip("sae_lens")
    case = Case("caa", "bridge")
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name="blocks.3.hook_resid_pre", model_name="tiny", prepend_bos=False)
    config = sae_lens.StandardSAEConfig(d_in=32, d_sae=24, dtype="float32", device="cpu", metadata=metadata)
    sae = sae_lens.StandardSAE(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    controller = case.controller * 0.2
    result = carriers(case.model, controller, metric, PROMPTS, components=sae, check=3)
    torch.testing.assert_close(result.values.sum(1) + result.rest, result.whole)
    assert result.labels[5] == "L3F5"
    assert result.correlation > 0.9
    name, best = "blocks.3.hook_resid_pre", result.top(1)[0]
    losses = []
    for ids in (torch.tensor([row]) for row in PROMPTS):
        with torch.no_grad():
            _, plain = case.model.run_with_cache(ids)
            with case.steer(controller=controller):
                logits, steered = case.model.run_with_cache(ids)
                change = sae.encode(steered[name])[..., best] - sae.encode(plain[name])[..., best]
                taken = change[..., None] * sae.W_dec[best]
                patched = case.model.run_with_hooks(ids, fwd_hooks=[(name, lambda x, hook, taken=taken: x - taken)])
        losses.append(float(metric(logits) - metric(patched)))
    assert float(result.exact[best]) == pytest.approx(sum(losses) / 2, abs=2e-5)
    sae.cfg.d_in = 16
    with pytest.raises(ValueError, match="the SAE reads 16 numbers"):
        carriers(case.model, controller, metric, PROMPTS, components=sae)
    with pytest.raises(TypeError, match="components='heads'"):
        carriers(case.model, controller, metric, PROMPTS, components="heads")


# -- direct --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
@pytest.mark.parametrize("point", ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z"])
def test_direct_shares_add_up(case, family, point):
    """For any metric, norm and acting point: all of the change is in the shares, up to rounding."""
    case = Case("caa", case.host, family=family)
    shape = host_of(case.model).shape(sl.Site(1, point))
    vector = torch.linspace(-1, 1, steps=32).view(shape)
    loops = [sl.Loop(sl.Add(vector), sl.Site(layer, point), where="all") for layer in (1, 2)]
    result = direct(case.model, sl.Controller(loops), metric, PROMPTS)
    assert result.total.abs().min() > 1e-3
    assert float(result.rest.abs().max()) < 3e-5 * max(1.0, float(result.values.abs().sum(1).max()))
    assert ("control" in result.kinds) == (point != "z")


@pytest.mark.parametrize("host", LENS)
def test_direct_shares_of_heads_equal_transformer_lens(host):
    """Writes of heads are those of `stack_head_results`, and their shares sum to attention's."""
    case = Case("caa", host, family="gpt2")
    ids = torch.tensor(PROMPTS[:1])
    difference = logit_difference(case.model, 5, 6)
    result = direct(case.model, case.controller, difference, PROMPTS[:1], heads=True)
    with torch.no_grad():
        _, plain = case.model.run_with_cache(ids)
        with case.steer():
            _, steered = case.model.run_with_cache(ids)
    moved = steered.stack_head_results(layer=-1) - plain.stack_head_results(layer=-1)
    layers = range(case.controller.layers[0], case.model.cfg.n_layers)
    mine = torch.einsum(
        "lbphk,lhkd->lhbpd",
        torch.stack([steered[str(sl.Site(layer, "z"))] - plain[str(sl.Site(layer, "z"))] for layer in layers]),
        torch.stack([host_of(case.model).head_writes(layer) for layer in layers]),
    ).flatten(0, 1)
    torch.testing.assert_close(moved[-len(mine) :], mine, rtol=0, atol=1e-4)
    heads = [index for index, kind in enumerate(result.kinds) if kind == "head"]
    assert len(heads) == len(mine)
    whole = direct(case.model, case.controller, difference, PROMPTS[:1])
    attention = [index for index, kind in enumerate(whole.kinds) if kind == "attn"]
    torch.testing.assert_close(result.values[:, heads].sum(), whole.values[:, attention].sum(), rtol=0, atol=1e-4)


@pytest.mark.lens3
def test_the_sum_is_that_of_logit_attrs():
    """On a processed HookedTransformer, where TransformerLens's rule (each side at its own scale) is exact as well."""
    from steerlens.models import tiny

    model = tiny("gpt2", host="hooked", processed=True)
    controller = Case("caa", "hooked", model=model).fit()
    ids = torch.tensor(PROMPTS[:1])
    result = direct(model, controller, logit_difference(model, 5, 6), PROMPTS[:1])
    logits = []
    with torch.no_grad():
        for strength in (0.0, 1.0):
            with sl.steer(model, controller, strength=strength):
                _, cache = model.run_with_cache(ids)
            stack = torch.cat([cache.decompose_resid(layer=-1), cache["steer_u", controller.layers[0]][None]])
            bias = model.unembed.b_U[5] - model.unembed.b_U[6]
            logits.append(cache.logit_attrs(stack, tokens=5, incorrect_tokens=6)[:, 0, -1].sum() + bias)
    assert float(result.values.sum()) == pytest.approx(float(logits[1] - logits[0]), abs=2e-4)
    assert float(result.total[0]) == pytest.approx(float(logits[1] - logits[0]), abs=2e-4)


def test_heads_behind_a_norm_are_refused(case):
    case = Case("caa", case.host, family="gemma")
    with pytest.raises(NotImplementedError, match="do not add up"):
        direct(case.model, case.controller, metric, PROMPTS, heads=True)


@pytest.mark.parametrize("nodes", [1, 2, 5, 8])
def test_gauss_legendre_integrates_polynomials_exactly(nodes):
    where, weights = _gauss_legendre(nodes)
    for power in range(2 * nodes):
        assert float((weights * where**power).sum()) == pytest.approx(1 / (power + 1), rel=1e-12)


def test_pictures_have_labelled_axes(case):
    pytest.importorskip("plotly")
    for kind in ("head", "neuron", "mlp"):
        layout = carriers(case.model, case.controller, metric, PROMPTS, components=kind, check=2).plot().layout
        assert layout.xaxis.title.text
        assert layout.yaxis.title.text
    layout = direct(case.model, case.controller, metric, PROMPTS).plot().layout
    assert layout.xaxis.title.text == "layer"


# -- the real model ------------------------------------------------------------------------------------------------


@pytest.mark.real_model
def test_on_a_real_model_the_gradient_tells_what_leaving_out_shows(smol):
    """Correlation above 0.9, for CAA on several layers and for A-LQR at all but the first."""
    model = smol("bridge")
    pairs = sl.shipped("sentiment")
    difference = logit_difference(model, [" great", " wonderful"], [" bad", " terrible"])
    prompts = ["The food at the restaurant was", "I saw the movie and it was"]
    plant = sl.linearize(model, pairs.positive[:1], progress=False)
    feedback = sl.lqr(model, pairs, linearization=plant, progress=False, paper=True)
    for controller in (sl.caa(model, pairs, layers=range(5, 25, 4)), feedback):
        result = attribute(model, controller, difference, prompts)
        assert result.correlation > 0.9, result
        assert abs(result.total) > 0.5
        shares = direct(model, controller, difference, prompts, heads=True)
        assert float(shares.rest.abs().max()) < 1e-4
        carried = carriers(model, controller, difference, prompts, check=8)
        assert carried.correlation > 0.9, carried
