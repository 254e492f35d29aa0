"""Each mistake in a law, a loop or a record is named in one sentence before anything is attached."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import steerlens as sl
from steerlens.testing import Case

IDS = torch.tensor([[3, 17, 25, 29, 41, 22, 9]])
SITE = sl.Site(1)
DIRECTION = torch.nn.functional.normalize(torch.linspace(-1, 2, 32), dim=0)


def controller():
    return sl.Controller([sl.Loop(sl.Project(DIRECTION[None], torch.zeros(32)), SITE)])


def law_of(act=None, **attributes):
    """A law with one method and some attributes."""

    class Mine(sl.Law):
        pass

    for name, value in (attributes | ({} if act is None else {"act": act})).items():
        setattr(Mine, name, value)
    return Mine()


def held(value):
    law = law_of(lambda self, x, now: (x, {}))
    law.gain = value
    return law


def one(self, x, now):
    return x, {"a": lambda: x[..., 0]}


MISTAKES = {
    "no act": (law_of(), "the Mine at blocks.1.hook_resid_post defines no act"),
    "only u": (
        law_of(lambda self, x, now: x),
        "act of the Mine at .* returns a Tensor; it returns a pair",
    ),
    "three": (law_of(lambda self, x, now: (x, {}, 1)), "returns a tuple of Tensor, dict, int; it returns a pair"),
    "no mapping": (law_of(lambda self, x, now: (x, [])), "returns signals as a list; give a mapping"),
    "undeclared": (law_of(one), "returns the signals a, but declares none"),
    "missing": (
        law_of(lambda self, x, now: (x, {}), signals=("a", "b")),
        "the signals none, but declares a, b",
    ),
    "another name": (law_of(one, signals=("b",)), "returns the signals a, but declares b"),
    "a string": (law_of(one, signals="a"), r"declares signals = 'a'; it is a tuple of names"),
    "a dot": (law_of(one, signals=("a.b",)), "a name has letters, digits and underscores"),
    "twice": (law_of(one, signals=("a", "a")), "declares a signal twice"),
    "taken": (law_of(one, signals=("u",)), "has a signal 'u', which every loop has"),
    "no such vector": (law_of(one, signals=("a",), vectors=("b",)), "has b in vectors, but not in signals"),
    "a tensor": (
        law_of(lambda self, x, now: (x, {"a": x[..., 0]}), signals=("a",)),
        "returns the signal 'a' as a Tensor; it is a function without arguments",
    ),
    "no tensor": (law_of(lambda self, x, now: (x, {"a": lambda: 1.0}), signals=("a",)), "gives a float, not a tensor"),
    "an argument": (law_of(lambda self, x, now: (x, {"a": lambda y: y}), signals=("a",)), "the signal 'a' .*TypeError"),
    "a vector": (
        law_of(lambda self, x, now: (x, {"a": lambda: x}), signals=("a",)),
        r"has shape \[1, 1, 32\] for one row of one token; it has to be \[batch pos\]; or declare vectors = \('a',\)",
    ),
    "a number per row": (
        law_of(lambda self, x, now: (x, {"a": lambda: x[:, 0, 0]}), signals=("a",)),
        r"has shape \[1\] for one row of one token; it has to be \[batch pos\]$",
    ),
    "no vector": (law_of(one, signals=("a",), vectors=("a",)), r"has to be \[batch pos ...\], since it is in vectors"),
    "other shape": (law_of(lambda self, x, now: (x[..., :3], {})), r"gives a control of shape \[3\], not \[32\]"),
    "NaN": (
        held(torch.tensor([float("nan")])),
        r"resid_post\.gain holds nan; the numbers of a controller must be finite",
    ),
    "NaN number": (held(float("nan")), r"resid_post\.gain holds nan"),
    "infinite number in a list": (held([1.0, float("inf")]), r"resid_post\.gain\[1\] holds inf"),
    "infinite control": (law_of(lambda self, x, now: (x + float("inf"), {})), "gives a control that is not finite"),
    "a misspelt lifetime": (law_of(lambda self, x, now: (x, now.layer)), "fails when it is tried .* AttributeError"),
    "no summary": (
        law_of(lambda self, x, now: (now.summary, {})),
        r"now.summary was asked for.*summary=Summary",
    ),
    "no tangent": (law_of(lambda self, x, now: (now.tangent, {})), r"now.tangent was asked for.*tangent=Direction"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_law_is_named_at_attach(mistake, tiny_model):
    law, words = MISTAKES[mistake]
    with pytest.raises(ValueError, match=words) as caught:
        sl.steer(tiny_model("bridge"), sl.Controller([sl.Loop(law, SITE)]))
    assert "Mine at blocks.1.hook_resid_post" in str(caught.value)
    assert "\n" not in str(caught.value)


class Band(sl.Setpoint):
    """Sound; each mistake replaces something of it."""

    signals = ("error",)

    def __init__(self):
        self.basis = DIRECTION[None]

    def measure(self, x):
        c = 1 - x @ DIRECTION
        return c[..., None], {"error": lambda: c.abs()}


def whole(x):
    return x, {"error": lambda: x[..., 0]}


SETPOINTS = {
    "no measure": ({"measure": sl.Setpoint.measure}, "defines no measure"),
    "only c": ({"measure": lambda self, x: x @ DIRECTION[:, None]}, "returns a Tensor; it returns a pair, coordinates"),
    "signals": (
        {"measure": lambda self, x: (x @ DIRECTION[:, None], {"eror": lambda: x[..., 0]})},
        "returns the signals eror, but declares error",
    ),
    "no error": ({"signals": ()}, "declares no signal 'error'"),
    "the state itself": (
        {"measure": lambda self, x: whole(x)},
        r"gives coordinates \[1, 1, 32\] that cannot be lifted",
    ),
    "no axis": (
        {"measure": lambda self, x: (x @ DIRECTION, {"error": lambda: x[..., 0]})},
        r"gives coordinates \[1, 1\] and an error|cannot be lifted",
    ),
    "no basis": ({"__init__": lambda self: None}, "cannot be lifted to an error: .* has no attribute 'basis'"),
    "basis of another width": (
        {"__init__": lambda self: setattr(self, "basis", DIRECTION[None, :3])},
        r"and an error \[1, 1, 3\] for states \[1, 1, 32\]",
    ),
}


@pytest.mark.parametrize("law", [lambda s: sl.Feedback(s, DIRECTION[None]), lambda s: sl.Pid(s, 0.1, 0.1, 0.0)])
@pytest.mark.parametrize("mistake", SETPOINTS)
def test_a_mistake_in_a_setpoint_is_named_at_attach(mistake, law, tiny_model):
    changes, words = SETPOINTS[mistake]
    setpoint = type("Mine", (Band,), changes)()
    with pytest.raises(ValueError, match=words) as caught:
        sl.steer(tiny_model("bridge"), sl.Controller([sl.Loop(law(setpoint), SITE)]))
    assert "the Mine of the " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sound_setpoint_is_attached_and_none_the_worse_for_the_trial(tiny_model):
    setpoint = Band()
    sl.steer(tiny_model("bridge"), sl.Controller([sl.Loop(sl.Feedback(setpoint, DIRECTION[None]), SITE)])).remove()
    assert set(vars(setpoint)) == {"basis"}


def test_a_law_without_a_control_at_zero_is_none_of_a_mistake(tiny_model):
    """It divides by |x|; a model's states are not zero."""
    law = law_of(lambda self, x, now: (x / x.norm(dim=-1, keepdim=True), {}))
    sl.steer(tiny_model("bridge"), sl.Controller([sl.Loop(law, SITE)])).remove()


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "words"),
    [
        ((sl.Add, 1), {}, TypeError, r"it got the class Add; make one: Add\(...\)"),
        (("add", 1), {}, TypeError, "it got a str; a law is a subclass of steerlens.Law"),
        ((sl.Add(DIRECTION), "resid_post"), {}, ValueError, "'resid_post' names no site"),
        ((sl.Add(DIRECTION), 1.0), {}, TypeError, "1.0 is no site"),
        ((sl.Add(DIRECTION), True), {}, TypeError, "True is no site"),
        ((sl.Add(DIRECTION), 1), {"name": "a.b"}, ValueError, "name='a.b'; a loop's name has letters"),
        ((sl.Add(DIRECTION), 1), {"name": "2"}, ValueError, "a letter first"),
        ((sl.Add(DIRECTION), 1), {"strength": float("nan")}, ValueError, "strength=nan"),
        ((sl.Add(DIRECTION), 1), {"strength": float("-inf")}, ValueError, "strength=-inf"),
        ((sl.Add(DIRECTION), 1), {"strength": 1e39}, ValueError, "strength=1e"),
        ((sl.Add(DIRECTION), 1), {"strength": "2"}, TypeError, "strength='2' is a str; give a number"),
        ((sl.Add(DIRECTION), 1, 2), {}, ValueError, "cannot sense blocks.2.hook_resid_post, which comes after"),
    ],
)
def test_a_mistake_in_a_loop_is_named(arguments, options, kind, words):
    with pytest.raises(kind, match=words):
        sl.Loop(*arguments, **options)


def test_a_factor_on_a_controller_is_a_finite_number():
    for factor in (float("nan"), float("inf"), 1e39):
        with pytest.raises(ValueError, match="factor="):
            controller() * factor
    with pytest.raises(TypeError, match="factor='2' is a str"):
        controller() * "2"
    with pytest.raises(ValueError, match=r"strength=1\.0"):
        controller() * 1e30 * 1e30
    assert (np.float32(0.5) * controller()).loops[0].strength == 0.5
    assert (controller() * torch.tensor(2)).loops[0].strength == 2


@pytest.mark.parametrize("place", [1, np.int64(1), torch.tensor(1), "blocks.1.hook_resid_post", sl.Site(1)])
def test_a_loop_takes_a_layer_or_a_hook_name_for_a_site(place):
    loop = sl.Loop(sl.Add(DIRECTION), place, place)
    assert loop.act == loop.sense == sl.Site(1)
    assert type(loop.act.layer) is int


def test_a_record_names_signals_that_there_are(host, tiny_model):
    model = tiny_model(host)
    with pytest.raises(ValueError, match=r"no loop has a signal 'eror'; there are u, u_norm, projection$"):
        sl.steer(model, controller(), record=("eror",))
    with pytest.raises(ValueError, match="it is None, 'scalars', 'all' or a tuple"):
        sl.steer(model, controller(), record="error")
    sl.steer(model, controller(), record=["projection", "u"]).remove()


def test_equal_loop_names_at_a_site_are_numbered_without_a_collision(host, tiny_model):
    """Each loop keeps a record of its own, whatever its name: `a`, `a` and `a2` are three."""
    loops = [sl.Loop(sl.Add((number + 1) * DIRECTION), SITE, name=name) for number, name in enumerate(["a", "a", "a2"])]
    model = tiny_model(host)
    with sl.steer(model, sl.Controller(loops), record=("u_norm",)) as run:
        Case("caa", host, model=model).logits(IDS)
    names = [own["u_norm"] for own in run.signals[SITE].own]
    assert len(set(names)) == 3
    norms = [float(run.record[name][0, -1]) for name in names]
    assert norms == pytest.approx([1.0, 2.0, 3.0], rel=1e-5)


def test_names_that_meet_only_when_joined_are_refused(tiny_model):
    """The loop `a` with a signal `b_u`, and the loop `a_b`."""
    law = law_of(lambda self, x, now: (x, {"b_u": lambda: x[..., 0]}), signals=("b_u",))
    loops = [sl.Loop(law, SITE, name="a"), sl.Loop(sl.Add(DIRECTION), SITE, name="a_b")]
    with pytest.raises(ValueError, match=r"two signals at blocks.1.hook_resid_post would be called .*a_b_u"):
        sl.steer(tiny_model("bridge"), sl.Controller(loops))


def test_a_control_that_the_models_dtype_cannot_hold_is_refused(host, tiny_model):
    """1e5 is infinite in float16, and the logits would be NaN."""
    large = sl.Controller([sl.Loop(sl.Add(1e3 * torch.ones(32)), SITE, strength=100.0)])
    words = r"the Add at blocks.1.hook_resid_post adds up to 1e\+05 to a state of zeros, and the model's torch.float16"
    with pytest.raises(ValueError, match=words):
        sl.steer(tiny_model(host, dtype=torch.float16), large)
    sl.steer(tiny_model(host, dtype=torch.bfloat16), large).remove()


def test_a_verb_for_features_takes_a_target():
    for verb in (sl.sae.hold, sl.sae.observe):
        with pytest.raises(TypeError, match=rf"{verb.__name__}\(\) takes a target, it got 31; make one first: feature"):
            verb(None, 31)
