"""Steering with sae-lens's own SAEs spliced into the model: at their site, around it, and as they come and go."""

from __future__ import annotations

import pytest
import torch

import steerlens as sl
from steerlens.hosts import host_of
from steerlens.models import tiny
from steerlens.testing import Case, snapshot

sae_lens = pytest.importorskip("sae_lens")
pytestmark = pytest.mark.lens3

IDS = torch.tensor([[3, 17, 25, 29, 41, 22, 9], [7, 30, 31, 32, 33, 8, 2]])
SHAPES = {"resid_pre": 32, "resid_mid": 32, "resid_post": 32, "attn_out": 32, "mlp_out": 32, "z": 32, "mlp_post": 64}


def model_on(host):
    """sae-lens's model class, with the tiny weights."""
    model = tiny("llama", host=host)
    if host == "bridge":
        from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge as Spliced
    else:
        Spliced = sae_lens.HookedSAETransformer
    model.__class__ = Spliced
    model._acts_to_saes, model._transcoder_output_hooks = {}, {}
    return model


def sae_at(site):
    width = SHAPES[site.point]
    shape = {"reshape_activations": "hook_z"} if site.point == "z" else {}
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name=str(site), model_name="tiny", prepend_bos=False)
    sae = sae_lens.StandardSAE(
        sae_lens.StandardSAEConfig(d_in=width, d_sae=48, dtype="float32", device="cpu", metadata=metadata, **shape)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return sae


def adding(model, site, scale=2.0, where="all"):
    shape = host_of(model).shape(site)
    vector = torch.linspace(-1, 1, steps=int(torch.tensor(shape).prod())).reshape(shape)
    return sl.Controller([sl.Loop(sl.Add(scale * vector), site, where=where)])


def inner(model, sae, name):
    base = sae.cfg.metadata.hook_name
    return model.get_sae_hook_name(sae, name) if hasattr(model, "get_sae_hook_name") else f"{base}.{name}"


@pytest.fixture(params=["bridge", "hooked"])
def model(request):
    return model_on(request.param)


@pytest.fixture
def site(request):
    return sl.Site(2, request.param)


ALL_POINTS = pytest.mark.parametrize("site", SHAPES, indirect=True)


@ALL_POINTS
def test_with_its_error_term_an_sae_at_the_site_changes_nothing(model, site):
    """decode(encode(x + u)) + error is x + u: the same logits as without the SAE, and the control as recorded."""
    controller = adding(model, site)
    with torch.no_grad():
        plain = model(IDS)
        with sl.steer(model, controller, record="all") as run:
            expected, u = model(IDS), run.record["blocks.2.hook_steer_u"]
            with model.saes(sae_at(site), use_error_term=True):
                logits = model(IDS)
                spliced = run.record["blocks.2.hook_steer_u"]
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
    assert torch.equal(u, spliced)


@ALL_POINTS
def test_without_its_error_term_the_sae_sees_the_control(model, site):
    """The SAE's input moves by u, its features with it, and its reconstruction is what the model gets."""
    if site.point == "resid_mid" and type(model).__name__ == "SAETransformerBridge":
        pytest.skip("TransformerBridge's hook_resid_mid is the MLP norm's input, not the stream")
    sae, controller = sae_at(site), adding(model, site)
    names = [inner(model, sae, part) for part in ("hook_sae_input", "hook_sae_acts_post", "hook_sae_output")]
    with torch.no_grad():
        _, plain = model.run_with_cache_with_saes(IDS, saes=sae)
        with sl.steer(model, controller):
            _, steered = model.run_with_cache_with_saes(IDS, saes=sae)
    u = steered["blocks.2.hook_steer_u"].reshape(*IDS.shape, -1)
    x = plain[names[0]].reshape(*IDS.shape, -1) + u
    torch.testing.assert_close(steered[names[0]].reshape(*IDS.shape, -1), x, rtol=0, atol=1e-5)
    flat = x.reshape(*IDS.shape, 4, 8) if site.point == "z" else x
    torch.testing.assert_close(steered[names[1]], sae.encode(flat), rtol=0, atol=1e-4)
    assert (steered[names[1]] - plain[names[1]]).abs().max() > 0.1
    torch.testing.assert_close(steered[names[2]], sae.decode(sae.encode(flat)).reshape(steered[names[2]].shape))


@pytest.mark.parametrize("point", ["attn_out", "resid_pre"])
def test_a_control_between_the_branches_passes_no_sae(point):
    """TransformerBridge writes resid_mid at attn_out: also behind an SAE there. HookedTransformer is the reference."""
    logits = []
    for host in ("bridge", "hooked"):
        model = model_on(host)
        controller = adding(model, sl.Site(2, "resid_mid"))
        with torch.no_grad(), sl.steer(model, controller), model.saes(sae_at(sl.Site(2, point))):
            logits.append(model(IDS))
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=5e-5)


def test_signals_are_cached_with_saes(model):
    """In run_with_cache_with_saes, whole and filtered, beside the SAE's features; around the SAE and at its site."""
    case = Case("lqr", "bridge", model=model, options={"paper": True})
    controller = case.fit()
    sae = sae_at(sl.Site(2))
    features = inner(model, sae, "hook_sae_acts_post")
    with torch.no_grad(), sl.steer(model, controller, record="all") as run:
        _, cache = model.run_with_cache_with_saes(IDS, saes=sae)
        record = run.record.copy()
        names = [features, "blocks.2.hook_steer_u", "blocks.3.hook_steer_error"]
        _, filtered = model.run_with_cache_with_saes(IDS, saes=sae, names_filter=lambda name: name in names)
    assert set(record) <= set(cache)
    assert set(filtered) == set(names)
    for name, value in record.items():
        torch.testing.assert_close(cache[name], value, rtol=0, atol=0, equal_nan=True)
    # upstream of the SAE nothing differs from a run without it; after it the loops meet what it has left
    with torch.no_grad(), sl.steer(model, controller, record="all") as run:
        model(IDS)
    name = "blocks.2.hook_steer_error"
    torch.testing.assert_close(run.record[name], record[name], rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(run.record["blocks.3.hook_steer_u"], record["blocks.3.hook_steer_u"])


def test_patching_a_signal_with_saes(model):
    controller, sae = adding(model, sl.Site(2)), sae_at(sl.Site(2))
    with torch.no_grad():
        plain = model.run_with_saes(IDS, saes=sae)
        with sl.steer(model, controller):
            hooks = [("blocks.2.hook_steer_u", lambda u, hook: 0 * u)]
            patched = model.run_with_hooks_with_saes(IDS, saes=sae, fwd_hooks=hooks)
    assert torch.equal(patched, plain)


def test_an_sae_may_come_and_go_while_steering(model):
    """Steering survives the hook points that sae-lens replaces, added before or after, removed before or after."""
    site = sl.Site(2)
    controller, sae = adding(model, site), sae_at(site)
    before = snapshot(model)
    with torch.no_grad():
        with sl.steer(model, controller):
            steered = model(IDS)
            model.add_sae(sae)
            spliced = model(IDS)
            model.reset_saes()
            assert torch.equal(model(IDS), steered)
        plain = model(IDS)
        model.add_sae(sae)
        unsteered_spliced = model(IDS)
        with sl.steer(model, controller):
            assert torch.equal(model(IDS), spliced)
            model.reset_saes()
            assert torch.equal(model(IDS), steered)
            model.add_sae(sae)
        assert torch.equal(model(IDS), unsteered_spliced)
        model.reset_saes()
        assert torch.equal(model(IDS), plain)
    assert not torch.equal(spliced, unsteered_spliced)
    after = snapshot(model)
    for part in ("weights", "lens hooks", "table"):
        assert after[part] == before[part]
    assert not any("steer" in name for name in after["torch hooks"])


def test_nested_runs_keep_their_order_when_saes_come_and_go(model):
    """The later run sees what the earlier added, and a cache made since sees both."""
    site = sl.Site(2)

    class Double(sl.Law):
        def act(self, x, now):
            return x, {}

    first = adding(model, site)
    second = sl.Controller([sl.Loop(Double(), site, where="all")])
    name = "blocks.2.hook_out" if hasattr(model, "_hook_registry") else str(site)
    with torch.no_grad(), sl.steer(model, first), sl.steer(model, second):
        _, expected = model.run_with_cache(IDS)
        for _ in range(2):
            model.run_with_saes(IDS, saes=sae_at(site))
            _, cache = model.run_with_cache(IDS)
            assert torch.equal(cache[name], expected[name])


@pytest.mark.parametrize("error_term", [True, False])
def test_generation_with_saes(model, error_term):
    """With and without a KV cache: the same tokens; with the error term, those of a model without SAEs."""
    controller, sae = adding(model, sl.Site(2), scale=0.5, where="last"), sae_at(sl.Site(2))
    options = {"max_new_tokens": 5, "do_sample": False, "stop_at_eos": False, "verbose": False}
    with torch.no_grad(), sl.steer(model, controller, record="all") as run:
        expected = model.generate(IDS, **options)
        u = run.record["blocks.2.hook_steer_u"]
        with model.saes(sae, use_error_term=error_term):
            on, steered = model.generate(IDS, **options), run.record["blocks.2.hook_steer_u"]
            off = model.generate(IDS, use_past_kv_cache=False, **options)
            torch.testing.assert_close(run.record["blocks.2.hook_steer_u"], steered)
    assert torch.equal(on, off)
    assert steered.shape == u.shape == (2, 11, 32)
    if error_term:
        assert torch.equal(on, expected)


def test_a_row_alone_equals_the_row_in_a_batch_with_saes(model):
    controller = adding(model, sl.Site(2), where="last")
    with torch.no_grad(), sl.steer(model, controller), model.saes(sae_at(sl.Site(2))):
        both, alone = model(IDS), model(IDS[1:])
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-5)


def transcoder():
    from sae_lens import Transcoder, TranscoderConfig

    metadata = sae_lens.saes.sae.SAEMetadata(
        hook_name="blocks.2.hook_resid_pre", hook_name_out="blocks.2.hook_mlp_out", model_name="tiny", prepend_bos=False
    )
    shape = {"d_in": 32, "d_out": 32, "d_sae": 48, "apply_b_dec_to_input": False}
    return Transcoder(TranscoderConfig(dtype="float32", device="cpu", metadata=metadata, **shape))


def test_a_transcoder_is_steered_at_its_output(model):
    """What a transcoder puts out does not depend on the MLP's own output, so the control is added behind it."""
    spliced = transcoder()
    with torch.no_grad():
        _, plain = model.run_with_cache_with_saes(IDS, saes=spliced)
        with sl.steer(model, adding(model, sl.Site(2, "mlp_out")), record="all"):
            _, steered = model.run_with_cache_with_saes(IDS, saes=spliced)
    name = next(name for name in plain if name.endswith("hook_sae_output"))
    # a hook's cache shows what its own later hooks made of it: the control is added at this very hook point
    torch.testing.assert_close(steered[name] - plain[name], steered["blocks.2.hook_steer_u"], rtol=0, atol=1e-5)


def test_a_transcoder_sees_a_control_at_its_input_or_is_refused(model):
    spliced, controller = transcoder(), adding(model, sl.Site(2, "resid_pre"))
    with torch.no_grad():
        with sl.steer(model, controller):
            steered = model(IDS)
            model.add_sae(spliced)
            _, cache = model.run_with_cache(IDS)
            model.reset_saes()
            # with the transcoder sae-lens has taken off every hook at its input, ours too
            assert torch.equal(model(IDS), steered)
        _, plain = model.run_with_cache_with_saes(IDS, saes=spliced)
        name = next(name for name in plain if name.endswith("hook_sae_acts_post"))
        assert (cache[name] - plain[name]).abs().max() > 1e-3
        model.add_sae(spliced)
        with pytest.raises(ValueError, match="a transcoder reads"):
            sl.steer(model, controller)
        model.reset_saes()


def test_fitting_and_gradients_with_an_sae_in_place(model):
    """What is read, and what a gradient is taken of, is the SAE's input, on which a control would be added."""
    site = sl.Site(2)
    host, sae = host_of(model), sae_at(site)
    weights = [[0.0] * 6 + [1.0]]
    clean = host.read([IDS[0].tolist()], weights, [site])[site]
    model.add_sae(sae, use_error_term=False)
    torch.testing.assert_close(host.read([IDS[0].tolist()], weights, [site])[site], clean)

    def loss(logits):
        return logits[0, -1, :5].sum()

    gradient = host.gradients([IDS[0].tolist()], weights, [site], loss)[site][0]
    v = torch.linspace(-1, 1, 32)
    values = []
    for step in (1e-2, -1e-2):
        loop = sl.Loop(sl.Add(step * v), site, where="last")
        with torch.no_grad(), sl.steer(model, sl.Controller([loop])):
            values.append(loss(model(IDS[:1])))
    assert float(gradient @ v) == pytest.approx(float(values[0] - values[1]) / 2e-2, rel=2e-2)
    model.reset_saes()
