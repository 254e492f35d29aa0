"""Vectors from other libraries and for them: what is imported steers as the library's own code does, bit for bit."""

from __future__ import annotations

import os
import types
from pathlib import Path

import pytest
import torch
from hooked import BLOCKS, EVERY, hooked, steered, vector

import steerlens as sl
from steerlens.models import tiny
from steerlens.sharing import (
    from_gguf,
    from_hidden_directions,
    from_repeng,
    from_steering_vectors,
    from_tensor,
    read_torch,
    to_gguf,
    to_interventions,
    to_lm_eval,
)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return tiny(family, host="bridge")


def test_vectors_by_layer_add_as_plain_hooks_do(model, family):
    v, w = vector(0), vector(1)
    expected = hooked(
        model, {f"{BLOCKS[family]}.1": lambda x: x + v * 0.5, f"{BLOCKS[family]}.3": lambda x: x + w * 0.5}
    )
    assert not torch.equal(expected, hooked(model, {}))
    stack = torch.stack([torch.zeros(32), v, torch.ones(32), w])
    for given in ({3: w, 1: v}, {3: w, 1: v.tolist(), 0: 5 * v}, stack):
        found = from_tensor(given, layers=[1, 3], strength=0.5)
        assert torch.equal(steered(model, found), expected)
        assert found.layers == [1, 3]
    # the same as the sum of single additions
    both = sl.add(v, layer=1, where=EVERY, strength=0.5) + sl.add(w, layer=3, where=EVERY, strength=0.5)
    assert torch.equal(steered(model, both), expected)


def test_vectors_are_refused_with_what_is_missing():
    with pytest.raises(ValueError, match=r"a stack without layers; name the layers"):
        from_tensor(torch.ones(4, 8))
    with pytest.raises(ValueError, match="no vector for layer 7; there are vectors for the layers 0, 1, 2, 3"):
        from_tensor(torch.ones(4, 8), layers=7)
    with pytest.raises(ValueError, match="no layers; there are vectors for the layers none"):
        from_tensor({})
    with pytest.raises(TypeError, match="'a' is no layer"):
        from_tensor({"a": torch.ones(4)})
    with pytest.raises(ValueError, match="layer -1 is negative"):
        from_tensor({-1: torch.ones(4)})
    for wrong in ("text", 3.0):
        with pytest.raises(TypeError, match="give a mapping by layer"):
            from_tensor(wrong, layers=0)


def control_vector(path, directions, **keys):
    """A file as repeng's `export_gguf` writes it, with the package gguf."""
    gguf = pytest.importorskip("gguf", reason="needs the extra demo")
    writer = gguf.GGUFWriter(path, keys.pop("architecture", "controlvector"))
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(directions))
    for key, value in keys.items():
        writer.add_key_value(key.replace("__", "."), value, gguf.GGUFValueType.get_type(value))
    for layer, direction in directions.items():
        writer.add_tensor(f"direction.{layer}", direction.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_control_vector_of_repeng_steers_as_its_control_module_does(model, family, tmp_path):
    """repeng adds `coeff * directions[l]` to the output of block l; llama.cpp adds `direction.l` after block l."""
    v = {layer: vector(layer).numpy() for layer in (1, 2, 3)}
    own = {f"{BLOCKS[family]}.{layer}": lambda x, u=u: x + torch.tensor(-1.5 * u) for layer, u in v.items()}
    expected = hooked(model, own)
    live = types.SimpleNamespace(model_type="llama", directions=v)
    path = control_vector(tmp_path / "v.gguf", {layer: torch.tensor(u) for layer, u in v.items()}, tags=["a", "b"])
    for found in (from_repeng(live, strength=-1.5), from_repeng(path, strength=-1.5), from_gguf(path, strength=-1.5)):
        assert torch.equal(steered(model, found), expected)
        assert found.recipe["arguments"]["model_hint"] == "llama"
    assert from_repeng(live, layers=[2]).layers == from_gguf(path, layers=2).layers == [2]
    with pytest.raises(ValueError, match=r"v.gguf holds vectors for the layers 1, 2, 3"):
        from_gguf(path, layers=[4])
    with pytest.raises(TypeError, match="takes a ControlVector or a GGUF file, it got a dict"):
        from_repeng({})


def test_a_controller_goes_through_gguf_unchanged(model, family, tmp_path):
    gguf = pytest.importorskip("gguf", reason="needs the extra demo")
    pairs = sl.Pairs(["w1 w2 w3", "w4 w5"], ["w6 w7", "w8 w9 w10"])
    before = sl.caa(model, pairs, layers=[1, 3], strength=0.7, where=EVERY)
    to_gguf(before, tmp_path / "v.gguf")
    after = from_gguf(tmp_path / "v.gguf")
    assert torch.equal(steered(model, before), steered(model, after))
    # provenance travels, so that another model is refused
    assert after.recipe["parts"] == [before.recipe]
    with pytest.raises(ValueError, match="was fitted on another model: the weights differ"):
        sl.steer(tiny(family, host="bridge", seed=1), after)
    # the package gguf finds what repeng and llama.cpp look for
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    assert {name: field.contents() for name, field in reader.fields.items() if name.startswith(("gen", "con"))} == {
        "general.architecture": "controlvector",
        "general.type": "adapter",
        "controlvector.model_hint": "unknown",
        "controlvector.layer_count": 2,
    }
    assert reader.fields["steerlens.operation"].contents() == "add"
    assert reader.fields["steerlens.hook_point"].contents() == "resid_post"
    for loop, tensor in zip(before, reader.tensors, strict=True):
        assert tensor.name == f"direction.{loop.act.layer}"
        assert torch.equal(torch.tensor(tensor.data.view("float32")), loop.law.vector * 0.7)


def test_vectors_before_a_block_are_written_after_the_one_before_it(model, tmp_path):
    v, w = vector(0), vector(1)
    before = sl.add(v, layer=2, point="resid_pre", where=EVERY)
    to_gguf(before, tmp_path / "v.gguf")
    after = from_gguf(tmp_path / "v.gguf")
    assert [str(site) for site in after.sites] == ["blocks.1.hook_resid_post"]
    assert torch.equal(steered(model, before), steered(model, after))
    # two at one place are one vector: equal up to the rounding of a sum
    to_gguf(before + sl.add(w, layer=1, where=EVERY, strength=-2), tmp_path / "v.gguf")
    assert torch.equal(from_gguf(tmp_path / "v.gguf").loops[0].law.vector, v - 2 * w)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sl.add(vector(0), layer=2), r"loop 'add' at blocks.2.hook_resid_post steers the tokens 'last'"),
        (lambda: sl.add(vector(0), layer=2, where="all"), "steers the tokens 'all'; .* the first one too"),
        (lambda: sl.add(vector(0), layer=2, where=slice(1, None)), r"steers the tokens slice\(1, None, None\)"),
        (lambda: sl.add(vector(0), layer=2, where=torch.ones(4, dtype=torch.bool)), "steers the tokens of a mask"),
        (
            lambda: sl.schedule(sl.add(vector(0), layer=2, where=EVERY), [1.0, 0.5]),
            "loop 'add' at blocks.2.hook_resid_post has a schedule",
        ),
        (
            lambda: sl.Controller(
                [
                    sl.Loop(
                        sl.Add(vector(0)),
                        2,
                        where=EVERY,
                        gates=[sl.Gate(sl.Side(vector(1), torch.tensor(0.0)), [sl.Summary(sl.Site(1))])],
                    )
                ]
            ),
            "loop 'loop' at blocks.2.hook_resid_post has a gate",
        ),
        (lambda: sl.add(vector(0), layer=2, where=EVERY) * 0, "this controller does nothing"),
    ],
)
def test_what_no_format_can_express_is_refused_by_name(make, words, tmp_path):
    for write in (lambda c: to_gguf(c, tmp_path / "x"), lambda c: to_lm_eval(c, tmp_path / "x")):
        with pytest.raises(ValueError, match=words):
            write(make())
        assert not list(tmp_path.iterdir())


def test_each_format_refuses_what_it_alone_cannot_express(tmp_path):
    projection = sl.project_out(vector(0), layer=2, where=EVERY)
    with pytest.raises(
        ValueError, match="is a Project, whose control depends on the state; a GGUF control vector only"
    ):
        to_gguf(projection, tmp_path / "x")
    with pytest.raises(ValueError, match=r"is a Project, .* an intervention spec only adds"):
        to_interventions(projection)
    with pytest.raises(ValueError, match=r"llama.cpp has no vector for it"):
        to_gguf(sl.add(vector(0), layer=0, where=EVERY), tmp_path / "x")
    with pytest.raises(ValueError, match="control vectors are at resid_post"):
        to_gguf(sl.add(vector(0), layer=1, point="mlp_out", where=EVERY), tmp_path / "x")
    with pytest.raises(ValueError, match="is the second one there"):
        to_lm_eval(projection + sl.add(vector(0), layer=2, where=EVERY), tmp_path / "x")
    with pytest.raises(ValueError, match=r"blocks.2.hook_mlp_out is inside a block; give model="):
        to_lm_eval(sl.add(vector(0), layer=2, point="mlp_out", where=EVERY), tmp_path / "x")
    with pytest.raises(ValueError, match=r"hooks a module's output, and blocks.2.attn.hook_z is not one"):
        to_lm_eval(sl.add(torch.ones(4, 8), layer=2, point="z", where=EVERY), tmp_path / "x")
    with pytest.raises(ValueError, match="acts where an intervention spec cannot write"):
        to_interventions(sl.add(vector(0), layer=2, point="resid_mid", where=EVERY))
    with pytest.raises(ValueError, match="steers the tokens 'last', which depend on the prompt"):
        to_interventions(sl.add(vector(0), layer=2))
    with pytest.raises(TypeError, match="a dict cannot be written as a GGUF control vector"):
        to_gguf({}, tmp_path / "x")


class LayerActivations:
    """What `steering_vectors.SteeringVector` holds."""

    def __init__(self, layer_activations, layer_type="decoder_block"):
        self.layer_activations, self.layer_type = layer_activations, layer_type


def test_a_steering_vector_is_added_where_its_layer_type_says(model, family):
    """The library adds `multiplier * v` to the output of the module, at the tokens from `min_token_index` on."""
    v, w = vector(0), vector(1)
    inside = {"llama": ("self_attn", "mlp"), "gpt2": ("attn", "mlp")}[family]
    for kind, module in (("decoder_block", None), ("self_attn", inside[0]), ("mlp", inside[1])):
        places = {layer: ".".join(filter(None, [BLOCKS[family], str(layer), module])) for layer in (1, 2)}
        expected = hooked(model, {places[1]: lambda x: x + 2.0 * v, places[2]: lambda x: x + 2.0 * w})
        given = LayerActivations({1: v, 2: w.view(1, -1)}, kind)
        found = from_steering_vectors(given, model=model, strength=2.0)
        assert torch.equal(steered(model, found), expected)
    mask = (torch.arange(5) >= 2).view(1, -1, 1)
    expected = hooked(model, {f"{BLOCKS[family]}.1": lambda x: x + mask * v})
    found = from_steering_vectors(LayerActivations({1: v, 2: w}), layers=1, where=slice(2, None))
    assert torch.equal(steered(model, found), expected)


def test_outputs_that_are_no_points_are_not_imported():
    norms = tiny("gemma", host="bridge")
    for kind in ("self_attn", "mlp"):
        with pytest.raises(ValueError, match="give model="):
            from_steering_vectors(LayerActivations({1: vector(0)}, kind))
        with pytest.raises(ValueError, match=f"in a Gemma2DecoderLayer the output of its {kind} module is no point"):
            from_steering_vectors(LayerActivations({1: vector(0)}, kind), model=norms)
    with pytest.raises(ValueError, match="no point at the output of a norm"):
        from_steering_vectors(LayerActivations({1: vector(0)}, "input_layernorm"))
    with pytest.raises(TypeError, match="takes a SteeringVector, it got a dict"):
        from_steering_vectors({})
    with pytest.raises(TypeError, match="modules of Hugging Face, it got a str"):
        from_steering_vectors(LayerActivations({1: vector(0)}, "mlp"), model="gpt2")


def test_directions_of_hidden_directions(tmp_path):
    model = tiny("llama", host="bridge")
    stack = torch.stack([vector(seed) for seed in range(4)]).bfloat16()
    torch.save(stack, tmp_path / "v.pt")
    expected = hooked(model, {"model.layers.2": lambda x: x + stack[2].float() * 1.5})
    for source in (tmp_path / "v.pt", str(tmp_path / "v.pt"), stack):
        assert torch.equal(steered(model, from_hidden_directions(source, layers=2, strength=1.5)), expected)
    with pytest.raises(ValueError, match="name the layers"):
        from_hidden_directions(stack)
    with pytest.raises(ValueError, match="neither a direction"):
        from_hidden_directions(stack[0])


def test_a_bias_that_was_baked_into_an_mlp(tmp_path):
    """The library gives the MLP's last matrix this bias, which a hook on the matrix does, too."""
    model, bias = tiny("llama", host="bridge"), vector(0).half()
    torch.save({"base_model": "a/b", "layer": 2, "components": ["pref"], "bias": bias}, tmp_path / "advocate_bias.pt")
    expected = hooked(model, {"model.layers.2.mlp.down_proj": lambda x: x + bias.float()})
    found = from_hidden_directions(tmp_path, model=model)
    assert torch.equal(steered(model, found), expected)
    assert found.recipe["arguments"] == {"strength": 1.0, "base_model": "a/b"}
    with pytest.raises(ValueError, match="baked into layer 2"):
        from_hidden_directions(tmp_path, layers=1, model=model)
    with pytest.raises(ValueError, match="a baked bias is inside a block; give model="):
        from_hidden_directions(tmp_path)
    with pytest.raises(ValueError, match="in a Gemma2DecoderLayer the output of its mlp module is no point"):
        from_hidden_directions(tmp_path, model=tiny("gemma", host="bridge"))


def test_intervention_specs_are_plain_and_add_up():
    v, w = vector(0), vector(1)
    every = sl.add(v, layer=2, where=EVERY, strength=0.5) + sl.add(w, layer=2, where=EVERY)
    assert to_interventions(every) == {"blocks.2.hook_out": {"op": "add", "value": (v * 0.5 + w).tolist()}}
    some = sl.add(v, layer=1, point="mlp_out", where=slice(1, 3)) + sl.add(
        w, layer=1, point="mlp_out", where=slice(2, 3)
    )
    assert to_interventions(some) == {
        "blocks.1.mlp.hook_out": {"op": "add", "value": [v.tolist(), (v + w).tolist()], "pos": [1, 2]}
    }
    assert to_interventions(sl.add(v, layer=1, where=slice(1, 3)))["blocks.1.hook_out"]["value"] == v.tolist()
    with pytest.raises(ValueError, match="has one `pos`"):
        to_interventions(every + sl.add(v, layer=2, where=slice(0, 2)))


def test_what_has_no_end_is_not_read(tmp_path):
    """A device that yields bytes for ever, and a sparse file of 64 GB that is no archive."""
    (tmp_path / "large.pt").write_bytes(b"no archive")
    os.truncate(tmp_path / "large.pt", 64 * 2**30)
    for path in [tmp_path / "large.pt", *[Path(name) for name in ("/dev/zero", "/dev/null") if os.path.exists(name)]]:
        for read in (read_torch, from_gguf, sl.Controller.load):
            with pytest.raises(ValueError, match="was not loaded: it is no"):
                read(path)
