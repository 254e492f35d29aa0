"""Weights in four or eight bits: controllers of the full model come along with a note, other weights are refused."""

from __future__ import annotations

import pytest
import torch
from architectures import build, tokenizer
from test_roles import IDS, close, logits_of

import steerlens as sl
from steerlens.hosts import host_of
from steerlens.models.wrap import wrap

PAIRS = sl.Pairs([([3, 17], [25]), ([5, 11], [60])], [([3, 17], [22]), ([5, 11], [2])])
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def _bitsandbytes(model, bits):
    library = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_compute_dtype=torch.float32)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model = replace_with_bnb_linear(model, modules_to_not_convert=["lm_head"], quantization_config=config)
    for path, module in model.named_modules():
        if isinstance(module, (library.nn.Linear4bit, library.nn.Linear8bitLt)):
            kind = library.nn.Params4bit if bits == 4 else library.nn.Int8Params
            options = {"quant_type": "nf4", "blocksize": 32} if bits == 4 else {"has_fp16_weights": False}
            module.support_avx512bf16_for_cpu = False  # its layout needs larger matrices
            module.weight = kind(state[f"{path}.weight"], requires_grad=False, **options).to("cpu")
    model.load_state_dict({k: v for k, v in state.items() if "proj" not in k}, strict=False, assign=True)
    return model.eval()


def quantised(form, model):
    if form == "torch int8":
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    return _bitsandbytes(model, {"bitsandbytes int8": 8, "bitsandbytes nf4": 4}[form])


FORMS = ("torch int8", "bitsandbytes int8", "bitsandbytes nf4")


def traced(model):
    return wrap("nnsight", "tests/llama", model, tokenizer(), processed=False, prepend_bos=False)


def named(model, name="tests/llama"):
    model.config._name_or_path = name
    return model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_controller_comes_along_to_the_quantised_model_of_its_name(name, form):
    full = traced(named(build(name)))
    small = traced(quantised(form, named(build(name))))
    assert host_of(small).quantised
    assert host_of(small).dtype == torch.float32, "what a model computes in, not what it keeps"
    fingerprint = host_of(small).fingerprint()
    assert fingerprint["n_layers"] == 3
    for controller in (
        sl.caa(full, PAIRS, layers=[1]),
        sl.lqr(full, PAIRS, paper=True, progress=False, linearize_on=1),
    ):
        base = logits_of(small, IDS)
        with pytest.warns(UserWarning, match="quantised"), sl.steer(small, controller):
            assert (logits_of(small, IDS) - base).abs().max() > 1e-3
        close(logits_of(small, IDS), base, "steered after the run", 1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_what_needs_the_matrices_or_their_gradient_is_refused_by_name(form):
    small = traced(quantised(form, build("llama")))
    with pytest.raises(NotImplementedError, match="weights of this model are quantised"):
        sl.cold_fd(small, PAIRS)
    with pytest.raises(NotImplementedError, match="weights of this model are quantised"):
        sl.tda(small, PAIRS)
    with pytest.raises(NotImplementedError, match="weights of this model are quantised"):
        host_of(small).head_writes(1)
    with pytest.raises(NotImplementedError, match="weights of this model are quantised"):
        sl.steer(small, sl.cold_fd(traced(build("llama")), PAIRS), trust=True)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_fitted_on_the_quantised_model_is_near_that_of_the_full_one(form):
    full, small = traced(build("llama")), traced(quantised(form, build("llama")))
    methods = [("caa", {"layers": [1]}), ("lqr", {"paper": True, "progress": False, "linearize_on": 1})]
    if form == "torch int8":
        # it rounds activations by the largest of the whole text, so that a token alone is another one
        with pytest.raises(RuntimeError, match=r"with a KV cache and .* without one"):
            sl.lqr(small, PAIRS, **methods.pop()[1])
    for method, options in methods:
        pair = [getattr(sl, method)(model, PAIRS, **options) for model in (full, small)]
        a, b = ([sl.core.tensors_of(loop.law)[0] for loop in controller.loops] for controller in pair)
        for mine, theirs in zip(a, b, strict=True):
            # four bits of a tiny random model leave a quarter of the direction
            assert float(torch.cosine_similarity(mine.flatten(), theirs.flatten(), dim=0)) > 0.8
