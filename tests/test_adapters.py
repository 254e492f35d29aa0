"""Models with adapters of PEFT: every point right, merged or not, and what their fingerprints tell apart."""

from __future__ import annotations

import warnings

import pytest
import torch
from architectures import build, tokenizer
from ground_truth import POINTS, Truth
from test_roles import IDS, close, logits_of

import steerlens as sl
from steerlens.hosts import host_of
from steerlens.models.wrap import wrap

peft = pytest.importorskip("peft")

#: The matrices that are adapted: all, and the two that most people adapt, which no probe of a fingerprint reads.
TARGETS = {
    "llama": ("q_proj", "o_proj", "up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "mixtral": ("q_proj", "o_proj"),
}
PAIRS = sl.Pairs([[3, 17, 25], [5, 11, 60]], [[29, 41, 22], [71, 80, 2]])
WITH_LABELS = sl.Pairs([([3, 17], [25]), ([5, 11], [60])], [([3, 17], [22]), ([5, 11], [2])])
#: The object that is given to the host: PEFT's own (which TransformerLens does not load), or the model inside it.
FORMS = [
    ("wrapped", "nnsight"),
    ("inside", "nnsight"),
    ("inside", "bridge"),
    ("merged", "nnsight"),
    ("merged", "bridge"),
]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::DeprecationWarning")


def adapted(name="llama", targets=None, seed=3, **options):
    """A model of PEFT, its adapter spread."""
    kind = options.pop("kind", peft.LoraConfig)
    if kind is peft.LoraConfig:
        options = {"r": 4, "init_lora_weights": False} | options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = kind(target_modules=list(targets or TARGETS[name]), task_type="CAUSAL_LM", **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peft.get_peft_model(build(name), config).eval()


def hosted(model, form, host):
    inner = {"wrapped": model, "inside": model.get_base_model()}.get(form)
    return wrap(
        host,
        "tests/adapted",
        model.merge_and_unload() if inner is None else inner,
        tokenizer(),
        processed=False,
        prepend_bos=False,
    )


def effective(model, path):
    """A matrix with its adapter, `[out in]`, from the formula of LoRA."""
    module = model.get_base_model().get_submodule(path)
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    return (module.base_layer.weight + module.scaling["default"] * b @ a).detach()


@pytest.mark.parametrize(("form", "host"), FORMS)
@pytest.mark.parametrize("name", TARGETS)
def test_every_point_of_an_adapted_model_is_read_and_written(name, form, host):
    reference = Truth(name, adapted(name).get_base_model())
    model = hosted(adapted(name), form, host)
    if (name, form, host) == ("gpt2", "inside", "bridge"):
        with pytest.raises(TypeError, match="leaves out the adapter of PEFT at attention's joint matrix"):
            host_of(model)
        return
    adapter, expected = host_of(model), reference.read(IDS)
    close(logits_of(model, IDS), reference.run(IDS), "logits")
    sites = [sl.Site(layer, point) for layer in range(3) for point in POINTS]
    sites = [site for site in sites if adapter.missing(site) is None]
    assert len(sites) >= 3 * (len(POINTS) - 1)
    read = adapter.states(IDS.tolist(), sites)
    for site in sites:
        close(read[site][0], expected[site.layer, site.point][0], f"{site} read")
        if site.layer == 1:
            u = torch.linspace(-1, 1, torch.Size(adapter.shape(site)).numel()).reshape(adapter.shape(site))
            with sl.steer(model, sl.Controller([sl.Loop(sl.Add(u), site, where="all")])):
                close(logits_of(model, IDS), reference.added(u, 1, site.point, IDS), f"{site} written")


@pytest.mark.parametrize(("form", "host"), [form for form in FORMS if form[0] != "merged"])
def test_an_adapted_model_generates_as_with_hooks(form, host):
    reference = Truth("llama", adapted().get_base_model())
    model, u = hosted(adapted(), form, host), torch.linspace(-2, 2, 32)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 97}
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    with sl.steer(model, sl.Controller([sl.Loop(sl.Add(u), sl.Site(1, "resid_pre"), where="last")])):
        if host == "bridge":
            tokens = model.original_model.generate(**inputs, **options)
        else:
            with model.generate(inputs, **options) as tracer:
                tokens = tracer.result.save()
    assert tokens.tolist() == reference.greedy(u, 1, "resid_pre", IDS, 5, IDS.shape[1] - 1).tolist()


@pytest.mark.parametrize("host", ["nnsight", "bridge"])
def test_a_controller_fitted_beside_an_adapter_is_that_of_the_merged_model(host):
    beside, merged = (hosted(adapted(), form, host) for form in ("inside", "merged"))
    for method in (sl.caa, sl.sadi, sl.tda):
        pair = [method(model, PAIRS, layers=[1]) for model in (beside, merged)]
        for mine, theirs in zip(*(controller.loops for controller in pair), strict=True):
            for a, b in zip(sl.core.tensors_of(mine.law), sl.core.tensors_of(theirs.law), strict=True):
                close(a.float(), b.float(), method.__name__)
    gains = [sl.lqr(model, PAIRS, paper=True, progress=False, linearize_on=1) for model in (beside, merged)]
    for mine, theirs in zip(gains[0].loops, gains[1].loops, strict=True):
        for a, b in zip(sl.core.tensors_of(mine.law), sl.core.tensors_of(theirs.law), strict=True):
            close(a, b, "lqr", 1e-3)


@pytest.mark.parametrize(("form", "host"), FORMS)
def test_matrices_hold_what_an_adapter_adds(form, host):
    adapter = host_of(hosted(adapted(), form, host))
    down, out = (effective(adapted(), f"model.layers.1.{path}") for path in ("mlp.down_proj", "self_attn.o_proj"))
    close(adapter.neuron_writes(1), down.T, "what a neuron writes")
    close(adapter.head_writes(1), out.T.unflatten(0, (4, 8)), "what a head writes")


@pytest.mark.parametrize("kind", ["LoraConfig", "IA3Config", "dora"])
def test_fingerprints_tell_adapters_apart_and_merging_changes_none(kind):
    options = {"kind": peft.IA3Config, "feedforward_modules": ["down_proj"], "init_ia3_weights": False}
    options = {"LoraConfig": {}, "dora": {"use_dora": True}}.get(kind, options)
    targets = ("k_proj", "down_proj")
    here = [host_of(hosted(adapted(targets=targets, **options), *form)) for form in FORMS]
    plain = host_of(wrap("nnsight", "x", build("llama"), tokenizer(), processed=False, prepend_bos=False))
    first = here[0].fingerprint()
    assert plain.differences(first) == ["the weights differ (same architecture, other training)"]
    for other in here[1:]:
        assert other.differences(first) == []


def test_an_adapter_that_no_probe_reads_is_remarked_and_another_one_refused():
    targets = ("q_proj", "v_proj")
    plain = wrap("nnsight", "x", build("llama"), tokenizer(), processed=False, prepend_bos=False)
    models = [
        hosted(adapted(targets=targets, seed=seed), *form)
        for seed, form in ((3, FORMS[0]), (3, FORMS[2]), (4, FORMS[1]))
    ]
    controller = sl.caa(models[0], PAIRS, layers=[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with sl.steer(models[1], controller):
            pass
    with pytest.raises(ValueError, match="adapter of PEFT differs"):
        sl.steer(models[2], controller)
    with pytest.warns(UserWarning, match="none of PEFT's adapters .* on one with one"), sl.steer(plain, controller):
        pass
    with pytest.warns(UserWarning, match="one of PEFT's adapters .* on one with none"):
        sl.steer(models[0], sl.caa(plain, PAIRS, layers=[1]))
    sl.clear(models[0])


def test_switching_an_adapter_off_gives_the_model_without():
    given = adapted()
    model, plain = hosted(given, "wrapped", "nnsight"), Truth("llama", build("llama"))
    controller = sl.Controller([sl.Loop(sl.Add(torch.linspace(-1, 1, 32)), sl.Site(1, "resid_pre"), where="all")])
    with given.disable_adapter(), sl.steer(model, controller):
        assert host_of(model).adapter() == []
        close(logits_of(model, IDS), plain.added(torch.linspace(-1, 1, 32), 1, "resid_pre", IDS), "switched off")


@pytest.mark.parametrize(("form", "host"), FORMS)
def test_gradients_of_parameters_need_the_adapter_merged(form, host):
    model = hosted(adapted(), form, host)
    if form == "merged":
        assert sl.cold_fd(model, WITH_LABELS).loops
        return
    with pytest.raises(NotImplementedError, match="merge the adapter first"):
        sl.cold_fd(model, WITH_LABELS)
    assert sl.cold_kernel(model, WITH_LABELS).loops, "gradients of activations need no parameters"


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_are_refused(kind):
    config = getattr(peft, kind)(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = peft.get_peft_model(build("llama"), config).eval()
    traced = wrap("nnsight", "x", model, tokenizer(), processed=False, prepend_bos=False)
    with pytest.raises(TypeError, match=f"{kind}: it puts virtual tokens in front"):
        host_of(traced)
