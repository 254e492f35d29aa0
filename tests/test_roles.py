"""Every point of every architecture, on both hosts, against PyTorch hooks; what is not there is refused by name."""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
from architectures import ARCHS, build, tokenizer
from ground_truth import POINTS, Truth, call_of

import steerlens as sl
from steerlens.hosts import host_of
from steerlens.hosts.layouts import LAYOUTS
from steerlens.models.wrap import wrap

#: Each layout once; `make test-models` runs all.
DISTINCT = (
    *("gpt_neo", "pythia", "gptj", "mixtral", "qwen3_moe_mixed", "qwen3_next", "gemma4_kvshared", "gemma4_moe"),
    *("olmo2", "falcon_new", "falcon_alibi_seq", "bloom", "opt", "opt_postnorm", "gpt_oss_square", "deepseek_v3"),
    *("cohere", "granite", "glm4", "mpt", "llama4_text", "jamba", "falcon_h1", "lfm2", "openai_gpt", "mamba"),
    "mamba2",
    *("gemma3_vlm", "llava", "qwen3_vl"),
)
#: What cannot be steered, and the words that say why.
REFUSED = {
    "t5": "encoder and a decoder",
    "bert_masked": "see those behind them",
    "gemma3n": "several streams",
    "gemma3n_vlm": "several streams",
}
#: Booting a multimodal TransformerBridge installs torchvision into the environment.
TOWERS = ("gemma3_vlm", "gemma4_vlm", "gemma3n_vlm", "llava", "qwen2_5_vl", "qwen3_vl")
NAMES = [name for name in ARCHS if name not in REFUSED]
HOSTS = ("bridge", "nnsight")

IDS = torch.tensor([[3, 17, 25, 29, 41, 22, 46]])
PADDED = torch.tensor([[97, 97, 3, 17, 25, 29], [5, 11, 60, 71, 80, 2]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])

pytestmark = pytest.mark.filterwarnings("ignore")


@cache
def model_of(name, host):
    """The model on a host, or the reason why there is none."""
    if host == "bridge" and name in TOWERS:
        return "multimodal TransformerBridges are not booted in tests"
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return wrap(host, f"tests/{name}", build(name), tokenizer(), processed=False, prepend_bos=False)
    except Exception as error:
        return f"{host} does not load it: {type(error).__name__}: {error}"


def loaded(name, host):
    model = model_of(name, host)
    if isinstance(model, str):
        pytest.skip(model[:150])
    try:
        off = float((logits_of(model, IDS) - truth_of(name).run(IDS)).abs().max())
    except AttributeError as error:
        pytest.skip(f"{host} does not run it: {error}")
    if off > 1e-3:
        pytest.skip(f"{host}'s own logits, without steering, are off by {off:.1e}")
    return model


@cache
def truth_of(name):
    return Truth(name, build(name))


def logits_of(model, ids, mask=None):
    mask = torch.ones_like(ids) if mask is None else mask
    if hasattr(model, "original_model"):
        with torch.no_grad():
            return model.original_model(**call_of(model.original_model, ids, mask)).logits
    with torch.no_grad(), model.trace(call_of(model._module, ids, mask)):
        logits = model.output.logits.save()
    return logits  # noqa: RET504 (bound by the trace)


def close(a, b, what, tolerance=1e-4):
    scale = max(1.0, float(b.abs().max()))
    assert float((a - b).abs().max()) <= tolerance * scale, f"{what}: off by {float((a - b).abs().max()):.1e}"


def param(name):
    return pytest.param(name, marks=[] if name in DISTINCT else pytest.mark.more_models)


def sites_of(host, truth):
    """Sites that the host offers; each one that it does not offer is refused by name."""
    offered = []
    for layer in range(host.n_layers):
        for point in POINTS:
            site = sl.Site(layer, point)
            if host.missing(site) is None:
                offered.append(site)
            else:
                with pytest.raises(ValueError, match=f"block {layer} "):
                    host.check([site])
    return offered


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", [param(name) for name in NAMES])
def test_every_point_that_a_block_has_is_read_and_every_other_refused(name, host):
    adapter, truth = host_of(loaded(name, host)), truth_of(name)
    expected = truth.read(IDS)
    offered = sites_of(adapter, truth)
    if host == "nnsight":
        assert {(site.layer, site.point) for site in offered} == set(expected)
    read = adapter.states(IDS.tolist(), offered)
    for site in offered:
        assert (site.layer, site.point) in expected, f"{host} offers {site}, the block has no such point"
        value = expected[site.layer, site.point][0]
        assert read[site][0].shape == value.shape
        close(read[site][0], value, f"{site} read")


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", [param(name) for name in NAMES])
def test_a_control_at_every_point_does_what_hooks_do(name, host):
    model, truth = loaded(name, host), truth_of(name)
    adapter = host_of(model)
    for site in sites_of(adapter, truth):
        if site.layer not in (0, 1):
            continue
        u = torch.linspace(-1, 1, torch.Size(adapter.shape(site)).numel()).reshape(adapter.shape(site))
        with sl.steer(model, sl.Controller([sl.Loop(sl.Add(u), site, where="all")])):
            steered = logits_of(model, PADDED, MASK)
        expected = truth.added(u, site.layer, site.point, PADDED, MASK)
        for row in range(2):
            real = MASK[row] > 0
            close(steered[row, real], expected[row, real], f"{site} written")


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", [param(name) for name in NAMES])
def test_generation_with_and_without_a_cache_is_that_of_hooks(name, host):
    model, truth = loaded(name, host), truth_of(name)
    site = sl.Site(1, "resid_pre")
    u = torch.linspace(-2, 2, 32)
    prompt = IDS[:, :4]
    expected = truth.greedy(u, 1, "resid_pre", prompt, 5, 3)
    inner = model.original_model if host == "bridge" else None
    plain = truth.greedy(torch.zeros(32), 1, "resid_pre", prompt, 5, 3)
    for use_cache in (True, False):
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "use_cache": use_cache}
        options |= {"eos_token_id": None, "pad_token_id": 97}
        if inner is not None:
            own = inner.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
            if own.tolist() != plain.tolist():
                continue  # TransformerLens 3.9's own cached pass of ALiBi models is another one
        with sl.steer(model, sl.Controller([sl.Loop(sl.Add(u), site, where="last")])):
            if inner is not None:
                tokens = inner.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
            else:
                with model.generate({"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}, **options) as t:
                    tokens = t.result.save()
        assert tokens.tolist() == expected.tolist(), f"use_cache={use_cache}"


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", ["falcon_new", "falcon_alibi_seq", "bloom", "gpt2"])
def test_a_branch_that_is_sensed_is_what_it_put_out_also_where_a_block_adds_to_it_in_place(name, host):
    model, expected = loaded(name, host), truth_of(name).read(IDS)
    v = torch.nn.functional.normalize(torch.linspace(-1, 2, 32), dim=0)
    law = sl.Feedback(sl.Level(v, 3.0), v[None])
    for point in ("attn_out", "mlp_out"):
        loop = sl.Loop(law, sl.Site(1, "resid_post"), sl.Site(1, point), where="all")
        with sl.steer(model, sl.Controller([loop])) as run:
            logits_of(model, IDS)
        close(run.record["projection", 1][:, 1:], (expected[1, point] @ v)[:, 1:], point)


#: Not linearised, and why.
CURVED = {"gemma4_kvshared": "keys and values of an earlier block", "openai_gpt": "has no KV cache"}
#: TransformerLens 3.9's own cached pass is another one.
TWO_PATHS = [(name, "bridge") for name in ("falcon_alibi_seq", "mpt", "bloom", "openai_gpt")]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", [param(name) for name in NAMES])
def test_the_linearised_path_is_that_of_the_model(name, host):
    """The chain of the blocks' Jacobians is the derivative of the whole model, by central differences in float64."""
    adapter, truth = host_of(loaded(name, host)), truth_of(name)
    if name in CURVED:
        with pytest.raises(NotImplementedError, match=CURVED[name]):
            adapter.nominal(IDS[0].tolist())
        return
    if (name, host) in TWO_PATHS:
        try:
            nominal = adapter.nominal(IDS[0].tolist())
        except RuntimeError as error:
            assert "with a KV cache" in str(error)  # noqa: PT017 (TransformerLens 4 is right)
            return
    nominal = adapter.nominal(IDS[0].tolist())
    expected, last = truth.read(IDS), len(truth.blocks) - 1
    close(nominal.states[1], expected[1, "resid_pre"][0, -1], "the state before block 1")
    chain = torch.eye(32)
    for layer in range(1, last + 1):
        chain = nominal.jacobian(layer) @ chain
    v = torch.linspace(-1, 1, 32)
    ends = []
    for step in (5e-3, -5e-3):

        def act(layer, point, x, step=step):
            if (layer, point) == (1, "resid_pre"):
                nudge = torch.zeros_like(x)
                nudge[0, -1] = step * v
                return x + nudge
            if (layer, point) == (last, "resid_post"):
                ends.append(x[0, -1])
            return x

        with truth.hooks(act):
            truth.run(IDS)
    close(chain @ v, (ends[0] - ends[1]) / 1e-2, "the Jacobian times a vector", 2e-2)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_steered_is_refused_by_name(name):
    nnsight = pytest.importorskip("nnsight")
    try:
        plain = build(name)
    except ImportError as error:
        pytest.skip(str(error).strip().splitlines()[0])
    with pytest.raises(TypeError, match=REFUSED[name]):
        host_of(nnsight.NNsight(plain))


@pytest.mark.parametrize("host", HOSTS)
def test_attention_that_is_not_causal_is_refused_whatever_the_model_is_called(host):
    """As in Gemma's models of embeddings, whose class is that of the causal ones."""
    import transformers

    config = build("gemma3").config
    config.use_bidirectional_attention = True
    with pytest.raises(TypeError, match="tokens see those behind them"):
        host_of(
            wrap(
                host,
                "tests/both",
                transformers.Gemma3ForCausalLM(config).eval(),
                tokenizer(),
                processed=False,
                prepend_bos=False,
            )
        )


class Backwards(torch.nn.Module):
    """A block of nobody's that says nothing of itself, and mixes in the mean over all tokens."""

    def __init__(self, block):
        super().__init__()
        self.norm, self.thinking = block.post_attention_layernorm, block.mlp

    def forward(self, x, **kwargs):
        return x + self.thinking(self.norm(x)) + x.mean(1, keepdim=True)


def test_blocks_that_no_table_knows_are_tried_for_what_they_see():
    plain = build("llama")
    plain.model.layers = torch.nn.ModuleList([Backwards(block) for block in plain.model.layers])
    model = wrap("nnsight", "tests/backwards", plain, tokenizer(), processed=False, prepend_bos=False)
    with pytest.raises(ValueError, match=r"change by .* with a token behind them: it is bidirectional"):
        host_of(model).states(IDS.tolist(), [sl.Site(1, "resid_post")])
    controller = sl.Controller([sl.Loop(sl.Add(torch.ones(32)), sl.Site(1, "resid_post"))])
    with pytest.raises(ValueError, match="with a token behind them"):
        sl.steer(model, controller)


#: Each way in which the tool finds a layout; `make roles` checks all architectures.
DERIVED = (
    *("LlamaForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "FalconForCausalLM", "Gemma3ForCausalLM"),
    *("GraniteForCausalLM", "Glm4ForCausalLM", "MixtralForCausalLM", "JambaForCausalLM", "OPTForCausalLM"),
)


@pytest.mark.lens3
@pytest.mark.parametrize("architecture", DERIVED)
def test_the_table_is_what_the_adapters_say(architecture):
    tool = import_from(Path(__file__).parents[1] / "tools" / "derive_roles.py")
    bridge, kinds = tool.adapted(architecture)
    for kind in kinds:
        changed = tool.roles(bridge) | tool.EXCEPTIONS.get(kind, {})
        expected = next(entry for names, entry in LAYOUTS if kind in names.split())
        assert expected == {key: value for key, value in changed.items() if value}


def import_from(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Unheard(torch.nn.Module):
    """A block of nobody's: the branches of another, under names of its own."""

    def __init__(self, block):
        super().__init__()
        self.first_norm, self.mixing = block.input_layernorm, block.self_attn
        self.second_norm, self.thinking = block.post_attention_layernorm, block.mlp

    def forward(self, x, **kwargs):
        x = x + self.mixing(hidden_states=self.first_norm(x), **kwargs)[0]
        return x + self.thinking(self.second_norm(x))


def test_blocks_that_no_table_knows_have_their_ends_and_the_rest_by_name():
    plain = build("llama")
    plain.model.layers = torch.nn.ModuleList([Unheard(block) for block in plain.model.layers])
    model = wrap("nnsight", "tests/unheard", plain, tokenizer(), processed=False, prepend_bos=False)
    expected = truth_of("llama").read(IDS)
    ends = [sl.Site(1, point) for point in ("resid_pre", "resid_post")]
    for site, read in host_of(model).states(IDS.tolist(), ends).items():
        close(read[0], expected[1, site.point][0], str(site))
    with pytest.raises(ValueError, match=r"is a Unheard, whose mlp_post steerlens does not know.*steerlens.roles"):
        host_of(model).check([sl.Site(1, "mlp_post")])
    with pytest.raises(ValueError, match="no module of that path"):
        sl.roles(model, attn_out="self_attn")
    names = {"attn_out": "mixing", "mlp_out": "thinking", "z": "mixing.o_proj", "mlp_post": "thinking.down_proj"}
    sl.roles(model, blocks="model.layers", **names, resid_mid="second_norm")
    adapter = host_of(model)
    sites = [sl.Site(1, point) for point in POINTS]
    for site, read in adapter.states(IDS.tolist(), sites).items():
        close(read[0], expected[1, site.point][0], str(site))
    u = torch.linspace(-1, 1, 32)
    for point in ("attn_out", "resid_mid", "mlp_out"):
        with sl.steer(model, sl.Controller([sl.Loop(sl.Add(u), sl.Site(1, point), where="all")])):
            close(logits_of(model, IDS), truth_of("llama").added(u, 1, point, IDS), point)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe_mixed", "gpt_oss_square"])
def test_a_mixture_of_experts_has_a_fingerprint_alike_on_both_hosts(name):
    bridge, traced = (host_of(loaded(name, host)).fingerprint() for host in HOSTS)
    assert bridge["probe"]
    assert bridge["probe"] == traced["probe"]


def test_a_controller_comes_with_its_model_to_eight_bits():
    """PyTorch's own int8 linear maps in place of all."""
    pairs = sl.Pairs([[3, 17, 25], [5, 11, 60]], [[29, 41, 22], [71, 80, 2]])
    plain = build("llama")
    model = wrap("nnsight", "tests/llama", plain, tokenizer(), processed=False, prepend_bos=False)
    controller = sl.caa(model, pairs, layers=[1])
    eight = torch.ao.quantization.quantize_dynamic(build("llama"), {torch.nn.Linear}, dtype=torch.qint8)
    small = wrap("nnsight", "tests/llama", eight, tokenizer(), processed=False, prepend_bos=False)
    base = logits_of(small, IDS)
    with pytest.warns(UserWarning, match="quantised"), sl.steer(small, controller):
        assert (logits_of(small, IDS) - base).abs().max() > 0.1
    with pytest.raises(NotImplementedError, match="quantised"):
        host_of(small).learner()
    with pytest.raises(NotImplementedError, match="quantised"):
        host_of(small).neuron_writes(1)


def test_roles_that_are_wrong_are_found_out_and_told():
    """The branch's norm forgotten: what is named as the branch is not what is added."""
    plain = build("glm4")

    class Misnamed(type(plain.model.layers[0])):
        pass

    for block in plain.model.layers:
        block.__class__ = Misnamed
    model = wrap("nnsight", "tests/misnamed", plain, tokenizer(), processed=False, prepend_bos=False)
    sl.roles(model, attn_out="self_attn", mlp_out="mlp")
    host_of(model).states(IDS.tolist(), [sl.Site(1, "resid_post")])
    with pytest.raises(ValueError, match=r"in block 1, a Misnamed, resid_pre \+ attn_out .* cannot be trusted"):
        host_of(model).states(IDS.tolist(), [sl.Site(1, "attn_out")])


def test_the_command_prints_the_page_of_models():
    from typer.testing import CliRunner

    from steerlens.cli.__main__ import app

    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    assert CliRunner().invoke(app, ["models"]).output.strip() == page.strip()
    assert {line.split(" | ")[0].strip("| ") for line in page.splitlines() if line.startswith("| ")} >= set(ARCHS)
