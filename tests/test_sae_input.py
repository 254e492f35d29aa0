"""What the autoencoder and its features must be like: every input that is refused, and with which words."""

from __future__ import annotations

import warnings

import pytest
import torch

import steerlens as sl
from steerlens.core import Site
from steerlens.diagnose import reach
from steerlens.models import tiny
from steerlens.sae import feature, hold, rank_features

sae_lens = pytest.importorskip("sae_lens")
from autoencoders import HOOK, TEXTS, autoencoder  # noqa: E402


def _bad(case):
    """`(exception, words, call)` of each input that must be refused."""
    model, sae = tiny("llama", host="bridge"), autoencoder()
    good = feature(sae, 3, level=4.0)
    unsaid = autoencoder(metadata={})
    dead = autoencoder()
    with torch.no_grad():
        dead.W_dec[3].copy_(-dead.W_enc[:, 3])
        dead.W_enc[:, 8], dead.W_dec[8] = dead.W_enc[:, 7], dead.W_dec[7]
    threshold = float(sae.threshold[3])
    transcoder = sae_lens.Transcoder(sae_lens.TranscoderConfig(d_in=32, d_sae=8, d_out=32, apply_b_dec_to_input=False))
    unfolded = autoencoder(normalize_activations="expected_average_only_in")
    folded = {"hook_name": HOOK, "model_from_pretrained_kwargs": {"center_writing_weights": True}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        centred = autoencoder(metadata=folded)
    normalised = autoencoder("StandardSAE", normalize_activations="layer_norm")
    return {
        "index": (IndexError, "no feature 40 in an autoencoder of 40", lambda: feature(sae, 40, level=1)),
        "twice": (ValueError, "none twice", lambda: feature(sae, [1, 1], level=1)),
        "no hook name": (ValueError, "no hook_name; pass the site", lambda: feature(unsaid, 1, level=4)),
        "other site": (ValueError, "leave site out", lambda: feature(sae, 1, level=4, site=Site(1))),
        "wrong hook": (ValueError, "no hook point", lambda: hold(model, feature(_at(9), 3, level=4))),
        "width": (
            ValueError,
            "has width 16",
            lambda: hold(model, feature(autoencoder(d=16), 3, level=4)),
        ),
        "centred": (ValueError, "trained on folded", lambda: hold(model, feature(centred, 3, level=4))),
        "no level": (ValueError, "the feature has no level", lambda: feature(sae, 3)),
        "two levels": (ValueError, "a level or a range", lambda: feature(sae, 3, level=1, at_most=2)),
        "crossed": (ValueError, "is above at_most", lambda: feature(sae, 3, at_least=5, at_most=2)),
        "negative": (ValueError, "an activation is 0 or more", lambda: feature(sae, 3, level=-1)),
        "count": (ValueError, "level has 2 numbers for 1", lambda: feature(sae, 3, level=[1, 2])),
        "threshold": (ValueError, "above its threshold", lambda: feature(sae, 3, level=threshold / 2)),
        "decoder": (ValueError, "does not rise along its decoder", lambda: feature(dead, 3, level=4)),
        "dependent": (ValueError, "cannot be moved apart", lambda: feature(dead, [7, 8], level=4)),
        "along": (ValueError, "'decoder' or 'encoder'", lambda: feature(sae, 3, level=4, along="up")),
        "quantile": (ValueError, "give model= and texts=", lambda: feature(sae, 3, quantile=0.5)),
        "transcoder": (
            TypeError,
            "reads at one hook point and writes at another",
            lambda: feature(transcoder, 3, level=4),
        ),
        "no sae": (
            TypeError,
            "not an autoencoder of sae-lens",
            lambda: feature(torch.nn.Linear(2, 2), 0, level=1),
        ),
        "unfolded": (ValueError, "fold its scale in", lambda: feature(unfolded, 3, level=4)),
        "bounded": (ValueError, "no activation exceeds", lambda: feature(normalised, 3, level=1e3)),
        "later layer": (ValueError, "comes after the feature's", lambda: sl.lqr(model, good, TEXTS, layers=[3])),
        "price": (ValueError, "r=-1", lambda: sl.lqr(model, good, TEXTS, r=-1)),
        "reach norm": (
            ValueError,
            "affine in the state",
            lambda: sl.lqr(model, feature(normalised, 3, level=1), TEXTS),
        ),
        "no text": (ValueError, "at least 2 tokens", lambda: sl.lqr(model, good, [])),
        "no prompt": (ValueError, "no prompts", lambda: reach(model, hold(model, good), good, [])),
        "one pair": (
            ValueError,
            "at least two texts",
            lambda: rank_features(model, sae, sl.Pairs([[1]], [[2]])),
        ),
    }[case]


def _at(layer):
    return autoencoder(metadata={"hook_name": f"blocks.{layer}.hook_resid_post"})


BAD = """index, twice, no hook name, other site, wrong hook, width, centred, no level, two levels, crossed, negative,
count, threshold, decoder, dependent, along, quantile, transcoder, no sae, unfolded, bounded, later layer, price,
reach norm, no text, no prompt, one pair""".replace("\n", " ").split(", ")


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_sentence(case):
    kind, words, call = _bad(case)
    with pytest.raises(kind, match=words):
        call()


def test_an_autoencoder_of_raw_weights_is_refused_on_a_folded_model():
    pytest.importorskip("transformer_lens.HookedTransformer")
    model = tiny("gpt2", host="hooked", processed=True)
    sae = autoencoder(d=model.cfg.d_model)
    with pytest.raises(ValueError, match="from_pretrained_no_processing or TransformerBridge"):
        hold(model, feature(sae, 3, level=4.0))


def test_another_treatment_of_bos_is_a_warning():
    sae = autoencoder(metadata={"hook_name": HOOK, "prepend_bos": True})
    with pytest.warns(UserWarning, match="the autoencoder was trained with it"):
        hold(tiny("llama", host="bridge"), feature(sae, 3, level=4.0))


@pytest.mark.parametrize("name", ["blocks.2.hook_out", "model.layers.2"])
def test_hook_names_of_the_bridge_and_of_hugging_face_are_understood(name):
    assert feature(autoencoder(metadata={"hook_name": name}), 3, level=4.0).site == Site(2)
