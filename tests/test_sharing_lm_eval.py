"""lm-eval's steered model and steerlens steer alike, by its file and by ours."""

from __future__ import annotations

import pytest
import torch
from hooked import BLOCKS, EVERY, TOKENS, hooked, steered, vector

import steerlens as sl
from steerlens.models import tiny
from steerlens.models.tiny import _model
from steerlens.sharing import from_lm_eval, to_lm_eval


def lm_eval_logits(model, path):
    """Logits with lm-eval's own functions, on the Hugging Face model."""
    steered_model = pytest.importorskip("lm_eval.models.hf_steered", reason="needs the extra eval")
    own = steered_model.SteeredModel
    hooks = {}
    for name, entry in torch.load(path, weights_only=False).items():
        v, bias, c = entry["steering_vector"], entry.get("bias"), float(entry.get("steering_coefficient", 1.0))
        if entry["action"] == "add":
            hooks[name] = lambda x, v=v, c=c: own.add(x, v * c, None)
        else:
            hooks[name] = lambda x, v=v, c=c, b=bias: own.clamp(x, v / torch.norm(v), c, None, b)
    with torch.no_grad(), steered_model.steer(model, hooks):
        return model(TOKENS).logits


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"], scope="module")
def test_lm_eval_steers_with_our_file_as_we_do(family, tmp_path):
    """On the Hugging Face model by lm-eval, on a TransformerBridge by steerlens: as far apart as they are unsteered."""
    model, plain = tiny(family, host="bridge"), _model(family, 4, 32, 0).eval()
    sites = [("resid_post", 1), ("attn_out", 2), ("mlp_out", 2)]
    controller = sl.project_out(vector(3), layer=3, where=EVERY)
    for seed, (point, layer) in enumerate(sites):
        controller += sl.add(vector(seed), layer=layer, point=point, where=EVERY, strength=0.5)
    to_lm_eval(controller, tmp_path / "s.pt", model=model)
    with torch.no_grad():
        apart = (plain(TOKENS).logits - model(TOKENS)).abs().max()
    theirs, ours = lm_eval_logits(plain, tmp_path / "s.pt"), steered(model, controller)
    assert not torch.allclose(theirs, plain(TOKENS).logits, atol=1e-2)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=float(2 * apart) + 1e-5)
    back = from_lm_eval(tmp_path / "s.pt", model=plain)
    assert back.sites == controller.sites
    torch.testing.assert_close(steered(model, back), ours, rtol=0, atol=1e-5)


def test_a_csv_of_features_is_answered_with_what_to_do(tmp_path):
    rows = "loader,action,sparse_model,hookpoint,feature_index,steering_coefficient\nsae_lens,add,m,layers.3,5,10\n"
    (tmp_path / "s.csv").write_text(rows)
    with pytest.raises(ValueError, match=r"names features of autoencoders.*sl\.add\(sae\.W_dec\[index\]"):
        from_lm_eval(tmp_path / "s.csv")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lm_evals_dictionary_is_imported_as_its_code_reads_it(family, tmp_path):
    model = tiny(family, host="bridge")
    v, b = vector(0), vector(1)
    blocks = BLOCKS[family].partition(".")[2]
    entry = {"steering_coefficient": 3.0, "head_index": None, "bias": None}
    held = {
        f"{blocks}.1": entry | {"steering_vector": v, "action": "add"},
        f"{blocks}.2": entry | {"steering_vector": v, "action": "clamp", "bias": b},
        f"{blocks}.3": {"steering_vector": b, "action": "clamp", "steering_coefficient": -1.0},
    }
    torch.save(held, tmp_path / "s.pt")
    found, d, e = from_lm_eval(tmp_path / "s.pt"), v / v.norm(), b / b.norm()
    expected = hooked(
        model,
        {
            f"{BLOCKS[family]}.1": lambda x: x + v * 3.0,
            f"{BLOCKS[family]}.2": lambda x: x - b + d * (3.0 - ((x - b) * d).sum(-1, keepdim=True)) + b,
            f"{BLOCKS[family]}.3": lambda x: x + e * (-1.0 - (x * e).sum(-1, keepdim=True)),
        },
    )
    # the projection is summed in another order: float32's rounding
    torch.testing.assert_close(steered(model, found), expected, rtol=0, atol=2e-5)
    to_lm_eval(found, tmp_path / "t.pt", model=model)
    again = from_lm_eval(tmp_path / "t.pt")
    torch.testing.assert_close(steered(model, again), expected, rtol=0, atol=2e-5)
    assert found.recipe == {"method": "from_lm_eval", "arguments": {"file": "s.pt", "strength": 1.0}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"action": "scale"}, "action='scale', not 'add' or 'clamp'"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"head_index": 2}, "has a head_index"),
        ({"steering_vector": [1.0]}, r"steering_vector that is no tensor \[d\]"),
        ({"steering_vector": torch.tensor([float("nan")])}, "steering_vector that is not finite"),
        ({"steering_coefficient": float("inf")}, "finite in float32"),
        ({"steering_coefficient": "3"}, "give a number"),
        ({"bias": torch.ones(2)}, "a bias, which 'add' does not use"),
        ({"action": "clamp", "steering_vector": torch.zeros(4)}, "direction of length zero"),
        ({"action": "clamp", "bias": torch.ones(3)}, "bias of another length"),
    ],
)
def test_entries_that_lm_eval_does_not_know_are_refused(change, words):
    entry = {"steering_vector": torch.ones(4), "steering_coefficient": 1.0, "action": "add"} | change
    with pytest.raises(ValueError, match=words):
        from_lm_eval({"layers.1": entry})


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("lm_head", "is no block of a model"),
        ("layers.1.mlp", "is inside a block; give model="),
        ("layers.1.self_attn", "is inside a block; give model="),
        ("blocks.1.hook_out", "names no site"),
    ],
)
def test_modules_that_are_no_points_are_refused(path, words):
    with pytest.raises(ValueError, match=words):
        from_lm_eval({path: {"steering_vector": torch.ones(4), "action": "add"}})
