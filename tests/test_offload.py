"""Models whose weights accelerate brings when a module runs: right, or refused in one sentence."""

from __future__ import annotations

import pytest
import torch
from architectures import build, tokenizer
from ground_truth import POINTS, Truth
from test_roles import IDS, close, logits_of

import steerlens as sl
from steerlens.hosts import host_of
from steerlens.models.wrap import wrap

accelerate = pytest.importorskip("accelerate")

PAIRS = sl.Pairs([([3, 17], [25]), ([5, 11], [60])], [([3, 17], [22]), ([5, 11], [2])])
PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2", "model.norm", "model.rotary_emb")
HOSTS = ("nnsight", "bridge")

pytestmark = pytest.mark.filterwarnings("ignore")


def kept(how, folder):
    model = build("llama")
    places = dict.fromkeys((*PARTS, "lm_head"), "cpu")
    for block in {"one block on disk": (1,), "all blocks on disk": (0, 1, 2)}.get(how, ()):
        places[f"model.layers.{block}"] = "disk"
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


HOW = ("all blocks on disk", "one block on disk", "by a device map")


def hosted(how, host, folder):
    """The model on a host; TransformerLens does not load what is on disk."""
    try:
        return wrap(host, "tests/llama", kept(how, folder), tokenizer(), processed=False, prepend_bos=False)
    except ValueError as error:
        assert host == "bridge"
        pytest.skip(f"{host} does not load it: {error}")


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("how", HOW)
def test_points_and_controls_are_those_of_the_model(how, host, tmp_path):
    model, truth = hosted(how, host, tmp_path), Truth("llama", build("llama"))
    adapter, expected = host_of(model), truth.read(IDS)
    assert adapter.device.type == "cpu"
    close(logits_of(model, IDS), truth.run(IDS), "logits")
    sites = [sl.Site(layer, point) for layer in range(3) for point in POINTS]
    read = adapter.states(IDS.tolist(), sites)
    for site in sites:
        close(read[site][0], expected[site.layer, site.point][0], f"{site} read")
        if site.layer < 2:
            u = torch.linspace(-1, 1, torch.Size(adapter.shape(site)).numel()).reshape(adapter.shape(site))
            with sl.steer(model, sl.Controller([sl.Loop(sl.Add(u), site, where="all")])):
                close(logits_of(model, IDS), truth.added(u, site.layer, site.point, IDS), f"{site} written")


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("how", HOW)
def test_methods_are_fitted_as_on_the_plain_model_or_refused(how, host, tmp_path):
    model = hosted(how, host, tmp_path)
    plain = wrap(host, "tests/llama", build("llama"), tokenizer(), processed=False, prepend_bos=False)
    for method, options in (
        ("caa", {}),
        ("lqr", {"paper": True, "progress": False, "linearize_on": 1}),
        ("cold_kernel", {}),
    ):
        found, expected = (getattr(sl, method)(each, PAIRS, **options) for each in (model, plain))
        for mine, theirs in zip(found.loops, expected.loops, strict=True):
            for a, b in zip(sl.core.tensors_of(mine.law), sl.core.tensors_of(theirs.law), strict=True):
                close(a, b, method)
    if how == "by a device map":
        assert sl.cold_fd(model, PAIRS).loops
        return
    with pytest.raises(NotImplementedError, match="accelerate keeps the parameters"):
        sl.cold_fd(model, PAIRS)


def test_no_offloaded_model_is_taken_for_one_on_a_server(tmp_path):
    adapter = host_of(hosted("all blocks on disk", "nnsight", tmp_path))
    assert not adapter.away
    with pytest.raises(NotImplementedError, match="output weights of the MLP are not here"):
        adapter.neuron_writes(1)
