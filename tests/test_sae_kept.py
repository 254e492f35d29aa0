"""A controller made from the shipped autoencoder, where sae-lens is not installed: TransformerLens 4 has none."""

from __future__ import annotations

import pytest
import torch
from conftest import DATA

import steerlens as sl
from steerlens.core import Controller
from steerlens.laws.feedback import Feedback

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def kept():
    """Holds one feature of the shipped autoencoder; see tests/data/README.md."""
    return Controller.load(DATA / "feature.safetensors")


def watching(controller):
    """The same feature read after the control."""
    (loop,) = controller.loops
    blind = Feedback(loop.law.setpoint, torch.zeros_like(loop.law.gains))
    return controller + Controller([loop.replace(law=blind, name="observe")], controller.recipe)


def test_a_kept_controller_holds_its_feature_while_the_model_generates(smol, host, kept):
    if host == "hooked":
        pytest.skip("HookedTransformer decodes several times slower, and its hooks are those of the Bridge")
    model = smol(host)
    level = kept.recipe["arguments"]["at_least"][0]
    with sl.steer(model, watching(kept)) as run:
        if host == "nnsight":
            with model.generate("My weekend was", max_new_tokens=24, do_sample=False):
                pass
        else:
            model.generate("My weekend was", max_new_tokens=24, do_sample=False, verbose=False)
        read = run.record["blocks.15.hook_steer_observe_feature"][0]
    held = read[~read.isnan()]
    assert len(held) >= 24
    torch.testing.assert_close(held, torch.full_like(held, level), atol=1e-3 * level, rtol=0)
