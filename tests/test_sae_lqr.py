"""`lqr` and `pid` of features: against a dense solver, hooks that know nothing of laws, and sae-lens's own encoder."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import steerlens as sl
from steerlens.control.linearization import Linearization
from steerlens.core import Now, Site
from steerlens.models import tiny
from steerlens.testing import Case

sae_lens = pytest.importorskip("sae_lens")
from autoencoders import IDS, TEXTS, autoencoder  # noqa: E402


def at(layer, **options):
    return autoencoder(metadata={"hook_name": f"blocks.{layer}.hook_resid_post", "prepend_bos": False}, **options)


def ladder(first=4.0, second=(3.0, 2.0)):
    """One feature at layer 1, two at layer 3."""
    return [sl.sae.feature(at(1), 3, level=first), sl.sae.feature(at(3), [7, 9], level=list(second))]


def made_up(model, layers=4, d=32):
    generator = torch.Generator().manual_seed(3)
    jacobians = torch.eye(d) + 0.2 * torch.randn(layers, d, d, generator=generator)
    path = torch.randn(layers + 1, d, generator=generator)
    return Linearization(jacobians, path, sl.hosts.host_of(model).fingerprint(), 1)


@pytest.mark.parametrize("layers", [None, [0, 1, 3], [0, 2]])
def test_a_target_at_each_of_two_layers_costs_the_least_energy_that_a_dense_solver_finds(layers):
    """One token through the linear model itself: controls of minimal norm under three linear constraints."""
    model, targets = tiny("llama", host="bridge"), ladder()
    linear, prices = made_up(model), [1.0, 2.0, 0.5, 3.0]
    controller = sl.lqr(
        model, targets, linearization=linear, r=prices, layers=layers, limit=None, progress=False, where="all"
    )
    jacobians, path = linear.jacobians.double(), linear.states.double()
    start = path[0] + 0.3 * torch.randn(32, generator=torch.Generator().manual_seed(4)).double()
    loops = {loop.act.layer: loop for loop in controller.loops}
    assert list(loops) == (layers or [0, 1, 2, 3])
    x, free, controls, states, unsteered = start, start, [], [], []
    for t in range(4):
        after, free = path[t + 1] + jacobians[t] @ (x - path[t]), path[t + 1] + jacobians[t] @ (free - path[t])
        u = torch.zeros(32).double()
        if t in loops:
            law = sl.core.map_tensors(loops[t].law, lambda tensor: tensor.double())
            sensed = x if loops[t].sense.point == "resid_pre" else after
            u = law.act(sensed[None, None], Now())[0][0, 0]
            controls.append(u)
        x = after + u
        states.append(x)
        unsteered.append(free)
    rows, need = [], []
    for target in targets:
        L, setpoint = target.site.layer, target.setpoint
        sensor, bias = setpoint.sensor.double(), setpoint.bias.double()
        goal = torch.tensor(target.at_least).double()
        torch.testing.assert_close(sensor @ states[L] + bias, goal, atol=1e-4, rtol=0)
        need.append(goal - sensor @ unsteered[L] - bias)
        blocks = []
        for t in loops:
            pulled = sensor
            for s in range(L, t, -1):
                pulled = pulled @ jacobians[s]
            blocks.append(pulled if t <= L else torch.zeros_like(pulled))
        rows.append(torch.cat(blocks, dim=1))
    scale = torch.tensor([prices[t] for t in loops]).double().repeat_interleave(32).sqrt()
    best = torch.linalg.lstsq(torch.cat(rows) / scale, torch.cat(need), driver="gelsd").solution / scale
    torch.testing.assert_close(torch.cat(controls), best, atol=1e-5, rtol=1e-4)


def test_a_target_at_each_of_two_layers_is_reached_on_every_host(host):
    case, targets = Case("caa", host), ladder()
    controller = sl.lqr(case.model, targets, TEXTS, limit=None, progress=False, where="all")
    with sl.steer(case.model, controller):
        steered = case.logits(torch.tensor([IDS]))
    reference = Case("caa", "bridge")
    with sl.steer(reference.model, controller):
        logits, cache = reference.model.run_with_cache(torch.tensor([IDS]))
    torch.testing.assert_close(steered, logits, atol=2e-5, rtol=0)
    for target in targets:
        read = at(target.site.layer).encode(cache["resid_post", target.site.layer])[0, 1:, list(target.indices)]
        torch.testing.assert_close(read, torch.tensor(target.at_least).expand_as(read), atol=1e-4, rtol=0)


def test_one_target_in_a_list_is_that_target():
    model, target = tiny("llama", host="bridge"), sl.sae.feature(autoencoder(), 3, level=4.0)
    one, several = (sl.lqr(model, data, TEXTS, progress=False, limit=None) for data in (target, [target]))
    x = torch.randn(2, 3, 32)
    for a, b in zip(one.loops, several.loops, strict=True):
        assert torch.equal(a.law.act(x, Now())[0], b.law.act(x, Now())[0])
        assert a.law.signals == ("error", "feature")
    assert one.recipe["found"] == several.recipe["found"]


def test_inside_the_range_nothing_is_done_and_below_it_the_edge_is_reached():
    model, sae = tiny("llama", host="bridge"), at(3)
    _, cache = model.run_with_cache(torch.tensor([IDS]))
    before = float(sae.encode(cache["resid_post", 3])[0, -1, 7].detach())
    assert before > float(sae.threshold[7].detach())
    for options, after in (({"at_least": 0.0}, before), ({"at_most": before / 2}, before / 2), ({"level": 0.0}, 0.0)):
        target = sl.sae.feature(sae, 7, **options)
        with sl.steer(model, sl.lqr(model, target, TEXTS, layers=[3], limit=None, progress=False)):
            _, steered = model.run_with_cache(torch.tensor([IDS]))
        assert float(sae.encode(steered["resid_post", 3])[0, -1, 7].detach()) == pytest.approx(after, abs=1e-4)


def test_pid_of_features_is_what_hooks_compute():
    """Errors along the decoder rows at two layers, with sum and difference between them."""
    model, saes, levels = tiny("llama", host="bridge"), [at(1), at(3)], [4.0, 3.0]
    targets = [sl.sae.feature(sae, 7, level=level) for sae, level in zip(saes, levels, strict=True)]
    kp, ki, kd = 0.3, 0.2, 0.1
    errors = []

    def answer(sae, level):
        def hook(x, hook):
            centre = sae.b_dec if sae.cfg.apply_b_dec_to_input else torch.zeros_like(sae.b_dec)
            z = (x - centre) @ sae.W_enc[:, 7] + sae.b_enc[7]
            d = sae.W_dec[7]
            errors.append((level - z)[..., None] * d / (d @ sae.W_enc[:, 7]))
            change = errors[-1] - errors[-2] if len(errors) > 1 else errors[-1]
            u = kp * errors[-1] + ki * sum(errors) + kd * change
            u[:, 0] = 0
            return x + u

        return hook

    hooks = [(str(t.site), answer(sae, level)) for t, sae, level in zip(targets, saes, levels, strict=True)]
    with torch.no_grad():
        expected = model.run_with_hooks(torch.tensor([IDS]), fwd_hooks=hooks)
    # in any order: the layers are the time
    controller = sl.pid(model, targets[::-1], kp=kp, ki=ki, kd=kd, where="all")
    with sl.steer(model, controller):
        torch.testing.assert_close(model(torch.tensor([IDS])), expected, atol=2e-5, rtol=0)


def test_pid_with_gain_one_holds_each_target_on_every_host(host):
    case, targets = Case("caa", host), ladder()
    together = sl.sae.hold(case.model, targets[0]) + sl.sae.hold(case.model, targets[1])
    logits = []
    for controller in (sl.pid(case.model, targets, kp=1.0), together):
        with sl.steer(case.model, controller):
            logits.append(case.logits(torch.tensor([IDS])))
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["lqr", "pid"])
def test_recipe_and_file_of_a_controller_of_features(name, tmp_path):
    model = tiny("llama", host="bridge")

    def fit(targets):
        if name == "pid":
            return sl.pid(model, targets, kp=1.0)
        return sl.lqr(model, targets, TEXTS, limit=None, progress=False)

    controller = fit(ladder())
    recipe = controller.recipe
    assert json.loads(json.dumps(recipe)) == recipe
    assert recipe["method"] == name
    assert [target["site"] for target in recipe["found"]["targets"]] == [str(Site(1)), str(Site(3))]
    # arguments for contrast texts alone are left out
    assert not {"level", "origin", "solver", "qf"} & set(recipe["arguments"])
    assert ("texts" in recipe["arguments"]) == (name == "lqr")
    same, other = fit(ladder()).recipe["data"], fit(ladder(first=5.0)).recipe["data"]
    assert recipe["data"] == same
    assert [a == b for a, b in zip(same, other, strict=True)] == [False, True]
    controller.save(tmp_path / "features.safetensors")
    loaded = sl.Controller.load(tmp_path / "features.safetensors")
    assert loaded.recipe == recipe
    logits = []
    for each in (controller, loaded):
        with sl.steer(model, each):
            logits.append(model(torch.tensor([IDS])))
    assert torch.equal(*logits)


def test_strength_is_a_factor_and_layers_may_be_an_array():
    model, target = tiny("llama", host="bridge"), sl.sae.feature(autoencoder(), 3, level=4.0)
    half = sl.lqr(model, target, TEXTS, layers=np.array([1, 2]), strength=0.5, limit=None, progress=False)
    assert [(loop.act, loop.strength) for loop in half.loops] == [(Site(1), 0.5), (Site(2), 0.5)]
    assert [loop.strength for loop in sl.pid(model, target, strength=0.5).loops] == [0.5]


def _mistake(case):
    model, good, pairs = tiny("llama", host="bridge"), ladder(), sl.Pairs([[1, 2, 3]], [[1, 2, 4]])
    wide = sl.sae.feature(at(1, d=16), 3, level=4.0)
    normalised = sl.sae.feature(at(2, kind="StandardSAE", normalize_activations="layer_norm"), 3, level=1)
    before = sl.sae.feature(autoencoder(metadata={"hook_name": "blocks.2.hook_resid_pre"}), 3, level=4.0)
    twin = sl.sae.feature(at(3), 12, level=1.0)
    return {
        "no texts": (ValueError, "needs texts to linearise on", lambda: sl.lqr(model, good)),
        "one string": (ValueError, "is a single string", lambda: sl.lqr(model, good, "a text")),
        "texts and linearization": (
            ValueError,
            "not both",
            lambda: sl.lqr(model, good, TEXTS, linearization=made_up(model)),
        ),
        "width": (ValueError, "has width 16", lambda: sl.lqr(model, [wide, good[1]], TEXTS)),
        "width, pid": (ValueError, "has width 16", lambda: sl.pid(model, wide)),
        "late layers": (ValueError, "no layer acts at or before", lambda: sl.lqr(model, good, TEXTS, layers=[2, 3])),
        "later layer": (
            ValueError,
            "comes after the feature's, 1",
            lambda: sl.lqr(model, good[0], TEXTS, layers=[0, 2]),
        ),
        "one layer twice": (ValueError, "two targets at blocks.3", lambda: sl.lqr(model, [*good, twin], TEXTS)),
        "one layer twice, pid": (ValueError, "two targets at blocks.3", lambda: sl.pid(model, [*good, twin])),
        "point": (ValueError, "needs a feature at a resid_post", lambda: sl.lqr(model, before, TEXTS)),
        "norm": (ValueError, "affine in the state", lambda: sl.lqr(model, normalised, TEXTS)),
        "beyond": (ValueError, "within the limit of 1 it goes", lambda: sl.lqr(model, ladder(first=1e4), TEXTS)),
        "mixed": (TypeError, "features and a Pairs", lambda: sl.lqr(model, [good[0], pairs], TEXTS)),
        "another method": (TypeError, "data is a Target; give steerlens.Pairs", lambda: sl.caa(model, good[0])),
        "weights": (ValueError, "r has 2 weights for 4 layers", lambda: sl.lqr(model, good, TEXTS, r=[1.0, 2.0])),
        "setpoint": (ValueError, "setpoint= is for contrast", lambda: sl.lqr(model, good, TEXTS, setpoint="angular")),
        "origin": (ValueError, "origin= is for contrast", lambda: sl.lqr(model, good, TEXTS, origin="zero")),
        "level": (ValueError, "level= is for contrast", lambda: sl.pid(model, good, level=2.0)),
        "solver": (ValueError, "solver= is for contrast", lambda: sl.lqr(model, good, TEXTS, solver="dense")),
        "paper": (ValueError, "paper= is for contrast", lambda: sl.lqr(model, good, TEXTS, paper=True)),
        "layers, pid": (ValueError, "layers= is for contrast", lambda: sl.pid(model, good, layers=[1])),
        "texts of pairs": (ValueError, "texts= is for features", lambda: sl.lqr(model, pairs, TEXTS)),
        "limit of pairs": (ValueError, "limit= is for features", lambda: sl.lqr(model, pairs, limit=None)),
    }[case]


MISTAKES = """no texts, one string, texts and linearization, width, width; pid, late layers, later layer,
one layer twice, one layer twice; pid, point, norm, beyond, mixed, another method, weights, setpoint, origin, level,
solver, paper, layers; pid, texts of pairs, limit of pairs""".replace("\n", " ").split(", ")


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_named_in_one_sentence(case):
    kind, words, call = _mistake(case.replace(";", ","))
    with pytest.raises(kind, match=words):
        call()


def test_features_that_the_layers_between_cannot_tell_apart_are_refused():
    """The same row at two layers, with a block between them that passes the state on as it is."""
    model = tiny("llama", host="bridge")
    linear = made_up(model)
    linear.jacobians[2] = torch.eye(32)
    targets = [sl.sae.feature(at(1), 3, level=4.0), sl.sae.feature(at(2), 3, level=5.0)]
    with pytest.raises(ValueError, match=r"features 3at1, 3at2 cannot be moved apart from layer 1"):
        sl.lqr(model, targets, linearization=linear, limit=None, progress=False)
