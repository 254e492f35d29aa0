"""Other values of an argument without a refit: equal to a refit, kept through files and sums, refused with reasons."""

import inspect
from functools import cache

import pytest
import torch

import steerlens as sl
from steerlens.core.part import tensors_of
from steerlens.fit.method import exported
from steerlens.fit.retune import RETUNES
from steerlens.testing import Case

#: New values of every argument that a method can change, and the options of the fit that they need.
VALUES = {
    "strength": [({}, 0.6), ({}, 0.0)],
    "level": [
        ({}, 0.4),
        ({}, 0.0),
        ({"level": 0.0}, 0.7),
        ({"origin": "zero"}, -0.3),
        ({"origin": "negative"}, 0.3),
        ({"origin": "midpoint"}, 0.3),
    ],
    "angle_rad": [({}, 0.15)],
    "distance": [({"distance": 2.0}, 1.0), ({}, 1.5)],
    "adaptive": [({}, True)],
    "alpha": [({}, 0.4)],
    "eta": [({}, 0.03), ({"scale": "absolute"}, 0.2)],
    "kp": [({}, 0.3)],
    "ki": [({}, 0.02)],
    "kd": [({}, 0.1)],
    "path": [({}, torch.linspace(-1, 1, 4 * 32).view(4, 32))],
}
#: Fits that need other options for an argument.
OPTIONS = {("lqr", "angle_rad"): {"setpoint": "angular"}, ("pid", "angle_rad"): {"setpoint": "angular"}}
MORE = [
    ("sadi", "strength", {"mode": "frozen", "paper": True}, 2.0),
    ("lqr", "level", {"solver": "dense"}, 0.4),
    ("lqr", "level", {"solver": "output", "preview": True}, 0.4),
    ("lqr", "level", {"solver": "output", "preview": True, "q": [0, 1, 0, 1]}, 0.0),
    ("lqr", "level", {"solver": "output", "preview": True, "origin": "negative"}, 0.4),
    ("track", "path", {"solver": "output"}, VALUES["path"][0][1]),
    ("cold_kernel", "eta", {"kernel": "linear"}, 0.03),
    ("lqr", "strength", {"level": 0.0}, 0.5),
    ("hold", "level", {}, 0.4),
    ("hold", "level", {"side": "at", "origin": "own", "layers": [1, 2]}, 0.4),
    ("hold", "level", {"side": "at_most", "direction": "probe", "unit": "logit"}, -1.0),
    ("hold", "trigger", {"unit": "activation", "level": 2.0, "origin": "midpoint"}, 0.5),
]


def cases():
    for name in exported(sl):
        own = RETUNES[name].names
        names = {"lqr": ["level", "angle_rad"], "pid": ["level", "angle_rad", "kp", "ki", "kd"]}.get(name, ())
        names = names if callable(own) else own
        for argument in dict.fromkeys([*names, "strength"]):
            if argument == "strength" and "strength" not in signature(name):
                continue
            for options, value in VALUES[argument]:
                yield name, argument, OPTIONS.get((name, argument), {}) | options, value
    yield from MORE


def signature(name):
    return inspect.signature(getattr(sl, name)).parameters


@cache
def case(name):
    return Case(name, "bridge")


def fitted(name, **options):
    torch.manual_seed(0)
    return case(name).fit(**options)


def assert_same(one, other, tolerance=2e-6):
    assert len(one) == len(other)
    for a, b in zip(one.loops, other.loops, strict=True):
        assert (a.act, a.sense, a.where, a.name, a.reference) == (b.act, b.sense, b.where, b.name, b.reference)
        assert a.strength == pytest.approx(b.strength, rel=1e-12)
        for x, y in zip(tensors_of(a.parts), tensors_of(b.parts), strict=True):
            assert torch.allclose(x, y, rtol=tolerance, atol=tolerance), (a.law, (x - y).abs().max())
    assert same_numbers(one.recipe["arguments"], other.recipe["arguments"])
    assert same_numbers(one.recipe["found"], other.recipe["found"])


def same_numbers(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_numbers(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same_numbers, a, b))
    return a == pytest.approx(b, rel=1e-6) if isinstance(a, float) and isinstance(b, float) else a == b


@pytest.mark.parametrize(("name", "argument", "options", "value"), cases())
def test_a_retuned_controller_equals_a_refit(name, argument, options, value):
    before = fitted(name, **options)
    copied = [tensor.clone() for tensor in tensors_of([loop.parts for loop in before])]
    again = {argument: value}
    if name == "odesteer" and argument != "strength":
        again = {"angle_rad": None, "distance": None} | again
    refit = fitted(name, **(options | again))
    found = before.retuned(**{argument: value})
    assert_same(found, refit)
    ids = torch.tensor([case(name).prompt])
    logits = []
    for controller in (found, refit):
        with case(name).steer(controller=controller):
            logits.append(case(name).logits(ids))
    case(name).close(*logits, "the logits")
    if name != "track":
        assert found.recipe["retuned"].keys() >= {argument}
    # nothing is changed in place
    for tensor, copy in zip(tensors_of([loop.parts for loop in before]), copied, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("fit", ["hold", "pid", "pid of two"])
def test_a_retuned_feature_equals_a_new_target(fit):
    from autoencoders import autoencoder

    model, sae = case("caa").model, autoencoder()
    other = autoencoder(metadata={"hook_name": "blocks.1.hook_resid_post", "prepend_bos": False})

    def make(level, more):
        target = sl.sae.feature(sae, 5, level=level)
        if fit == "hold":
            return sl.sae.hold(model, target)
        targets = [target, sl.sae.feature(other, [3, 7], level=more)] if "two" in fit else target
        return sl.pid(model, targets, kp=1.0)

    found = make(2.0, [1.0, 1.5]).retuned(level=[2.5, 3.0, 0.0] if "two" in fit else 0.0)
    wanted = make(0.0, [2.5, 3.0])
    assert_same(found, wanted)
    assert found.retuned(at_least=3.0).retuned(level=4.0).recipe["retuned"] == found.recipe["retuned"]
    with pytest.raises(ValueError, match="cannot have the activation"):
        found.retuned(level=1e-6)


@pytest.mark.parametrize("several", [False, True])
def test_levels_that_were_predicted_change_without_a_refit(several):
    """Of features that earlier layers reach, and of several concepts with preview."""
    from autoencoders import autoencoder

    model, data = case("caa").model, case("caa").data
    texts = [text for text in data.positive if isinstance(text, str)] or ["w1 w2 w3", "w4 w5 w6"]
    saes = [autoencoder(metadata={"hook_name": f"blocks.{t}.hook_resid_post", "prepend_bos": False}) for t in (1, 3)]

    def reach(one, other, limit=None):
        targets = [sl.sae.feature(saes[0], [3, 7], level=one), sl.sae.feature(saes[1], 5, level=other)]
        chosen = targets if several else targets[1]
        return sl.lqr(model, chosen, texts, limit=limit, progress=False)

    before, wanted = reach([1.0, 1.5], 2.0), reach([2.5, 3.0], 0.0)
    found = before.retuned(level=[2.5, 3.0, 0.0] if several else 0.0)
    assert found.recipe["found"]["predicted_energy"] != before.recipe["found"]["predicted_energy"]
    assert_same(found, wanted)
    assert_same(found.retuned(level=[1.0, 1.5, 2.0] if several else 2.0), before)
    # the energy of all features needs a loop that has all of them
    assert ("predicted_energy" in before.only([3]).retuned(level=0.0).recipe["found"]) is not several
    with pytest.raises(ValueError, match="within the limit of 100"):
        reach([1.0, 1.5], 2.0, limit=100.0).retuned(level=1e5)
    if several:
        concepts = {"solver": "output", "preview": True, "progress": False}
        two, levels = [data, data[:2]], ([0.2, 0.4], [0.5, 0.1])
        first, second = (sl.lqr(model, two, level=level, **concepts) for level in levels)
        assert_same(first.retuned(level=levels[1]), second)


def test_of_a_sum_the_summands_that_know_the_argument_change():
    a, b, c = fitted("lqr"), fitted("angular"), fitted("pid")
    gate = sl.gate(case("caa").model, case("caa").data)
    whole = sl.when((a + b) * 2.0, gate) + c.only([2])
    found = whole.retuned(level=0.3).retuned(angle_rad=1.0)
    wanted = sl.when((a.retuned(level=0.3) + b.retuned(angle_rad=1.0)) * 2.0, gate) + c.only([2]).retuned(level=0.3)
    for x, y in zip(found, wanted, strict=True):
        assert (x.group, x.strength, len(x.gates)) == (y.group, y.strength, len(y.gates))
        assert all(torch.equal(p, q) for p, q in zip(tensors_of(x.parts), tensors_of(y.parts), strict=True))
    assert found.recipe["parts"] == wanted.recipe["parts"]
    # a summand whose loops were left out keeps its place
    late = (a + b).only([3]) + (fitted("pid").only([0]) + b)
    moved = late.retuned(kp=0.5)
    assert [loop.law.law.kp for loop in moved if loop.name == "pid"] == [0.5]


def test_a_factor_outlives_a_level_of_zero(tmp_path):
    """Off at level 0, and as strong as before at another one; whenever the factor came, also through a file."""
    fit, ids = fitted("lqr"), torch.tensor([case("lqr").prompt])
    wanted, plain = fitted("lqr", level=0.4) * -2.0, case("lqr").logits(ids)
    for off in ((fit * -2.0).retuned(level=0.0), fit.retuned(level=0.0) * -2.0):
        off.save(tmp_path / "off.safetensors")
        for controller in (off, sl.Controller.load(tmp_path / "off.safetensors")):
            for record in ("all", None):
                with case("lqr").steer(controller=controller, record=record):
                    assert torch.equal(case("lqr").logits(ids), plain)
            assert_same(controller.retuned(level=0.4), wanted)


def test_a_file_can_be_retuned(tmp_path):
    fitted("lqr").save(tmp_path / "a.safetensors")
    found = sl.Controller.load(tmp_path / "a.safetensors").retuned(level=0.3)
    assert_same(found, fitted("lqr", level=0.3))
    assert found.recipe["retuned"] == {"level": None}


@pytest.mark.parametrize(
    ("make", "changes", "words"),
    [
        (lambda: fitted("lqr"), {"q": 0.5}, "q enters the fit of lqr: fit again.*level, strength"),
        (lambda: fitted("caa"), {"level": 0.5}, "caa has no argument 'level'; caa changes without a refit: strength"),
        (lambda: fitted("caa"), {"where": "all"}, "controller.at"),
        (lambda: fitted("caa"), {}, "without an argument"),
        (lambda: fitted("caa") + fitted("hpr"), {"layers": 1}, "enters the fit of caa and hpr"),
        (lambda: fitted("pid"), {"kp": 0.0}, "one of them other than 0"),
        (lambda: fitted("lqr"), {"level": float("nan")}, "finite"),
        (lambda: fitted("hold"), {"level": float("nan")}, "level=nan; it must be finite"),
        (lambda: fitted("lqr"), {"level": [1.0, 2.0]}, "2 numbers for 1 concepts"),
        (lambda: fitted("lqr"), {"angle_rad": 1.0}, "angle_rad enters the fit of lqr"),
        (lambda: fitted("caa", strength=0.0), {"strength": 1.0}, "no factor changes to 1"),
        (lambda: fitted("odesteer"), {"angle_rad": 1.0, "distance": 1.0}, "two lengths"),
        (lambda: fitted("track"), {"path": torch.zeros(2, 2)}, "path has shape"),
        (lambda: sl.Controller(fitted("caa").loops), {"strength": 1.0}, "your own has no argument 'strength'"),
    ],
)
def test_what_cannot_be_changed_is_refused_with_a_reason(make, changes, words):
    with pytest.raises(ValueError, match=words):
        make().retuned(**changes)


@pytest.mark.parametrize("name", ["lqr", "hold"])
def test_a_level_that_is_no_number_is_refused(name):
    with pytest.raises(TypeError, match="level='x'; give a number, or a list of numbers"):
        fitted(name).retuned(level="x")
