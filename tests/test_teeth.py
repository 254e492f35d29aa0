"""The conformance suite fails what it should: for each check a method that breaks its promise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import steerlens as sl
from steerlens.core import POINTS
from steerlens.fit.card import Card
from steerlens.fit.contrast import Pairs
from steerlens.fit.method import method
from steerlens.fit.reading import contrast_means, pick_layers
from steerlens.testing import Case, checks, discover_hosts

CHECKS = {check.__name__.removeprefix("check_"): check for check in checks()}
CARD = Card(needs="sets", points=POINTS)
DOCUMENT = """Add the mean difference.

    u = s (m+ - m-)

Args:
    model: A model.
    data: Contrast texts.
    layers: Where to act.
    point: Point of the block.
    strength: s, no unit.
    where: Token positions.

Returns:
    One loop. Recorded signals: `u`, `u_norm`.

Raises:
    ValueError: a layer that the model does not have.

Source: A. Nobody (arXiv 2501.00001).
"""


def made(*, card=CARD, document=DOCUMENT, change=None, ask=None):
    """A sound method, but for its card, its docstring, what it adds, or what else it asks of the host."""

    @method(card=card)
    def halfway(
        model: Any,
        data: Pairs,
        *,
        layers: Any = None,
        point: str = "resid_post",
        strength: float = 1.0,
        where: Any = "last",
    ) -> sl.Controller:
        (site,) = pick_layers(model, layers, point, default="middle")
        positive, negative = contrast_means(model, data, [site])
        v = positive[site] - negative[site]
        if ask is not None:
            ask(model)
        loop = sl.Loop(sl.Add(v), site, where=where, strength=strength)
        return sl.Controller([loop if change is None else change(loop, model)])

    halfway.__doc__ = document
    return halfway


def case(host=None, **options):
    return Case(made(**options), host or discover_hosts()[0])


@pytest.mark.parametrize("name", CHECKS)
def test_a_sound_method_passes(name):
    CHECKS[name](case())


def adding(value):
    return lambda loop, model: loop.replace(law=sl.Add(value(loop.law.vector, model)))


class Doubtful(sl.Law):
    """A control that depends on what it must not, in another dtype, or without a derivative."""

    calls = 0

    def __init__(self, kind):
        self.kind = kind
        self.size = torch.ones(())

    def act(self, x, now):
        if self.kind == "counts":
            count = now.sequence["count"] = now.sequence.get("count", 0) + 1
            return torch.ones_like(x) * count, {}
        if self.kind == "looks at its neighbours":
            return torch.ones_like(x) * x.mean(dim=(0, 1)), {}
        if self.kind == "half":
            return torch.ones_like(x, dtype=torch.float16), {}
        if self.kind == "remembers":
            Doubtful.calls += 1
            return torch.ones_like(x) * Doubtful.calls, {}
        return torch.ones_like(x) * self.size.detach(), {}


def doubtful(kind):
    return lambda loop, model: loop.replace(law=Doubtful(kind))


BROKEN = {
    "fits_with_defaults": (adding(lambda v, model: v * 0), "changes nothing"),
    "equal_on_every_host": (
        adding(lambda v, model: v * (1 + sum(map(ord, type(model.model).__name__)) % 97)),
        "steered logits",
    ),
    "zero_is_no_steering": (lambda loop, model: loop.replace(strength=1.0), "strength=0.0"),
    "same_seed_same_controller": (adding(lambda v, model: torch.randn(len(v))), "other tensors"),
    "cache_on_equals_off": (doubtful("counts"), "differ"),
    "batch_row_equals_row_alone": (doubtful("looks at its neighbours"), "differ"),
    "dtype_is_kept": (doubtful("half"), "saw or gave"),
    "gradients_flow": (doubtful("constant"), "no gradient reaches"),
    "composes_in_order": (doubtful("remembers"), "differ"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_method_fails(name):
    change, words = BROKEN[name]
    with pytest.raises(AssertionError, match=words):
        CHECKS[name](case(change=change))


@pytest.mark.parametrize("host", discover_hosts())
def test_a_method_that_depends_on_its_library_fails_on_every_host(host):
    change, words = BROKEN["equal_on_every_host"]
    with pytest.raises(AssertionError, match=words):
        CHECKS["equal_on_every_host"](case(host, change=change))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"needs": "texts"}, "needs='texts'; with texts: data is a list"),
        ({"needs": "completions"}, "needs='completions'; with sets: it fits"),
        ({"points": ("resid_post",)}, "not on the card, but it fits"),
        ({"points": ("resid_pre",)}, "it acts at"),
        ({"derivatives": "blocks"}, "derivatives='blocks', but fitting uses"),
        ({"derivatives": "weights"}, "derivatives='weights', but fitting uses"),
        ({"prompt_passes": 2}, "0 passes more than unsteered, the card says 1"),
        ({"token_passes": 2}, "0 passes more than unsteered, the card says 4"),
        ({"concepts": True}, "concepts=True; with two"),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_a_wrong_card_fails_in_every_family(family, changes, words):
    wrong = Case(made(card=replace(CARD, **changes)), discover_hosts()[0], family=family)
    with pytest.raises((AssertionError, TypeError, ValueError, AttributeError), match=words):
        CHECKS["card"](wrong)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda host: host.nominal([1, 2, 3]), r"fitting uses \['blocks'\]"),
        (lambda host: host.learner(), r"fitting uses \['parameters'\]"),
        (lambda host: host.neuron_writes(0), r"fitting uses \['weights'\]"),
        (lambda host: host.head_writes(0), r"fitting uses \['weights'\]"),
    ],
)
def test_a_card_that_hides_what_fitting_needs_fails(ask, words):
    with pytest.raises(AssertionError, match=words):
        CHECKS["card"](case(ask=ask))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("Add the mean difference.", "add it", "begin with a sentence"),
        ("u = s (m+ - m-)", "as in the paper", "no equation"),
        ("    where: Token positions.\n", "", r"does not document \['where'\]"),
        ("    where: Token", "    place: Token", r"does not document \['where'\]"),
        ("    where: Token", "    place: A\n    where: Token", r"documents \['place'\]"),
        ("no unit", "a number", "lacks shapes or units"),
        ("Returns:\n    One loop. R", "Now r", "lacks what is returned"),
        ("ValueError: a layer", "a layer", "lacks what is raised"),
        ("`u`, `u_norm`", "the usual", "lacks the recorded signals"),
        ("A. Nobody (arXiv 2501.00001)", "none", "names no paper: 'none.'"),
        ("Source: A. Nobody (arXiv 2501.00001).", "An arXiv paper. Source:", "names no paper: ''"),
    ],
)
def test_a_poor_docstring_fails(old, new, words):
    assert old in DOCUMENT
    with pytest.raises(AssertionError, match=words):
        CHECKS["docstring"](case(document=DOCUMENT.replace(old, new)))


class Chatty(sl.Law):
    signals = ("mood",)

    def act(self, x, now):
        return torch.ones_like(x), {"mood": lambda: x[..., 0]}


def test_a_signal_that_the_docstring_does_not_name_fails():
    with pytest.raises(AssertionError, match="does not name the signal mood"):
        CHECKS["signals_are_recorded"](case(change=lambda loop, model: loop.replace(law=Chatty())))
