"""That everything sent to a server survives the journey: a walk over its code, and a proof that the walk sees."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from dataclasses import dataclass
from typing import NamedTuple

import jaxtyping
import pytest
import torch
from torch.nn.attention import SDPBackend
from travel import problems

import steerlens
from steerlens import Add, Law
from steerlens.core import Loop, Part, Pass, Positions, Record, Site
from steerlens.core.signals import SiteSignals
from steerlens.fit.objectives import Labelled, Objective, objective
from steerlens.hosts.blocks import hf


def parts():
    """Every law, setpoint and other part of steerlens, also those inside the methods' files."""
    for module in pkgutil.walk_packages(steerlens.__path__, "steerlens."):
        if not module.name.startswith(("steerlens.models", "steerlens.cli", "steerlens.testing", "steerlens.hosts")):
            importlib.import_module(module.name)

    def below(kind):
        for child in kind.__subclasses__():
            yield child
            yield from below(child)

    return sorted(
        {kind for kind in below(Part) if kind.__module__.startswith("steerlens")}, key=lambda kind: kind.__name__
    )


@pytest.mark.parametrize(
    "kind", [*parts(), Pass, Record, Loop, Site, Positions, SiteSignals], ids=lambda kind: kind.__name__
)
def test_what_a_controller_is_made_of_travels(kind):
    assert problems(kind) == []


def test_what_an_edit_runs_travels():
    pytest.importorskip("nnsight")
    from steerlens.control import gains
    from steerlens.core.package import Ambassador
    from steerlens.hosts.blocks import context, graph, nominal, readout
    from steerlens.hosts.traced import anatomy, differences, edit, explicit
    from steerlens.steering import _prepare

    things = [edit.follow, edit.Tap, graph.pool, explicit.apply_here, _prepare, Ambassador, anatomy.gradients_at]
    things += [differences.differences, anatomy.call_beside, gains.gains_beside, gains.Gains, gains.Blocks]
    things += [nominal.Nominal, nominal.Capture, context.FixedContext, context.Times, readout.Readout]
    for thing in (*things, anatomy.Anatomy, Labelled, Objective):
        assert problems(thing) == []


@pytest.mark.parametrize("loss", ["dpo", "sft", "negative_sft"])
def test_a_loss_travels(loss):
    assert problems(objective(loss, beta=0.1, reference="self").loss) == []


def test_travelling_modules_import_annotations_as_text():
    """Annotations are pickled with a function: evaluated ones would name classes that the server lacks."""
    for kind in [*parts(), Pass, Record]:
        assert importlib.import_module(kind.__module__).annotations.compiler_flag


class Kept(NamedTuple):
    size: float


@dataclass
class Settings:
    size: float


def doubled(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)

    return wrapper


class Supered(Add):
    def act(self, x, now):
        return super().act(x, now)


class Mangled(Law):
    def act(self, x, now):
        return self.__size * x, {}


class Decorated(Law):
    @doubled
    def act(self, x, now):
        return x, {}


class Dataclassed(Law):
    def act(self, x, now):
        return x * Settings(2.0).size, {}


class Tupled(Law):
    def act(self, x, now):
        return x * Kept(2.0).size, {}


class ClientOnly(Law):
    def act(self, x, now):
        return x if isinstance(x, torch.Tensor) else jaxtyping.Float, {}


class Moduled(Law):
    def act(self, x, now):
        return hf.FrozenCache(x, x).get_seq_length() * x, {}


class Nameless(Law):
    def act(self, x, now):
        return x * len(SDPBackend.__members__), {}


@pytest.mark.parametrize(
    ("law", "words"),
    [
        (Supered, "calls super() without arguments"),
        (Mangled, "mangled name __size"),
        (Decorated, "decorated with doubled"),
        (Dataclassed, "dataclass or NamedTuple"),
        (Tupled, "dataclass or NamedTuple"),
        (ClientOnly, "names jaxtyping, which a server lacks"),
        (Nameless, "cannot be sent by its name"),
        (Moduled, "names the module steerlens.hosts.blocks.hf"),
    ],
)
def test_the_walk_sees_each_forbidden_construct(law, words):
    assert any(words in problem for problem in problems(law)), problems(law)
