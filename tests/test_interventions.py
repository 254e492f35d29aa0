"""TransformerLens 4 steers with our intervention specs as we do: by its own driver, on a model that it serves."""

from __future__ import annotations

import pytest
import torch
from hooked import EVERY, vector

import steerlens as sl
from steerlens.models import tiny
from steerlens.models.tiny import _model, _tokenizer
from steerlens.sharing import to_interventions

source = pytest.importorskip(
    "transformer_lens.model_bridge.sources.inspect", reason="needs TransformerLens 4 and the extra eval"
)
pytest.importorskip("inspect_ai", reason="needs the extra eval")
TOKENS = torch.tensor([[3, 17, 25, 29, 4]])


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("served"))
    _model("llama", 4, 32, 0).save_pretrained(folder)
    _tokenizer(folder).save_pretrained(folder)
    return source.boot_inspect(folder, provider="tl_bridge")


@pytest.mark.parametrize(
    "controller",
    [
        sl.add(vector(0), layer=2, where=EVERY, strength=0.5) + sl.add(vector(1), layer=3, where=EVERY),
        sl.add(vector(0), layer=1, where=slice(1, 3)),
        sl.add(vector(0), layer=1, where=slice(1, 3)) + sl.add(vector(1), layer=1, where=slice(3, 4)),
        sl.add(vector(0), layer=1, point="resid_pre", where=EVERY),
        sl.add(vector(0), layer=1, point="attn_out", where=EVERY),
        sl.add(vector(0), layer=1, point="mlp_out", where=EVERY),
        sl.add(vector(0).view(4, 8), layer=1, point="z", where=EVERY),
    ],
    ids=["resid_post", "slice", "two slices", "resid_pre", "attn_out", "mlp_out", "z"],
)
def test_a_served_model_is_steered_alike(served, controller):
    model = tiny("llama", host="bridge")
    with torch.no_grad():
        plain = model(TOKENS)
        with sl.steer(model, controller):
            expected = model(TOKENS)
    assert torch.equal(served.forward(TOKENS), plain)
    assert torch.equal(served.forward(TOKENS, intervene=to_interventions(controller)), expected)
    assert not torch.equal(expected, plain)
