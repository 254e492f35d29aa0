"""That everything sent to a server survives the journey: a walk over its code, and a proof that the walk sees."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import subprocess
import sys
from dataclasses import dataclass
from typing import NamedTuple

import jaxtyping
import pytest
import torch
from torch.nn.attention import SDPBackend
from travel import problems

import steerlens
from steerlens import Add, Law
from steerlens.core import Companion, Loop, Now, Part, Pass, Positions, Record, Site, check_loops
from steerlens.core.signals import SiteSignals
from steerlens.fit.objectives import Labelled, Objective, objective
from steerlens.hosts import host_of
from steerlens.hosts.blocks import hf
from steerlens.testing import Case, discover_methods

#: Rooms that hold no parts, and whose modules may need libraries that are not installed.
ELSEWHERE = tuple(f"steerlens.{room}" for room in ("models", "cli", "testing", "hosts", "evaluate"))


def parts():
    """Every law, setpoint and other part of steerlens, also those inside the methods' files."""
    for module in pkgutil.walk_packages(steerlens.__path__, "steerlens."):
        if not module.name.startswith(
            ("steerlens.models", "steerlens.cli", "steerlens.testing", "steerlens.hosts", "steerlens.evaluate")
        ):
            importlib.import_module(module.name)

    def below(kind):
        for child in kind.__subclasses__():
            yield child
            yield from below(child)

    return sorted(
        {kind for kind in below(Part) if kind.__module__.startswith("steerlens")}, key=lambda kind: kind.__name__
    )


@pytest.mark.parametrize(
    "kind", [*parts(), Pass, Record, Loop, Now, Site, Positions, SiteSignals], ids=lambda kind: kind.__name__
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

    things = [
        edit.follow,
        edit.Plain,
        edit.Enter,
        edit.Carry,
        edit.Before,
        edit.Mid,
        graph.pool,
        explicit.apply_here,
        _prepare,
        Ambassador,
        anatomy.gradients_at,
    ]
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


ARRIVE = """
import sys
sys.modules["steerlens"] = None  # as on a server
import torch
from nnsight.intervention.serialization import loads

arrived = loads(open(sys.argv[1], "rb").read())
arrived["try"](arrived, torch)
"""


def steer_once(arrived, torch):
    """What a server does: check the loops, scale them, and go by their sites."""
    controller, shapes = arrived["controller"] * 0.5, arrived["shapes"]
    arrived["check"](controller.loops, lambda site: shapes[site.point])
    run = arrived["pass"]

    class Apart(arrived["companion"]):
        def states(self, sites, *, goes_on):
            return {site: torch.ones(1, 3, *shapes[site.point]) for site in sites}

        def tangents(self, sites, direction, *, goes_on):
            return self.states(sites, goes_on=goes_on)

    run.begin((1, 3), companion=lambda kept: Apart())
    for site in run.sites:
        x = torch.linspace(-1, 1, 3).view(1, 3, *[1] * len(shapes[site.point])).expand(1, 3, *shapes[site.point])
        assert torch.isfinite(run.at(site, x)).all()
    torch.save(dict(run.log.pieces), arrived["path"])


def test_every_methods_controller_steers_where_steerlens_is_missing(tmp_path):
    """Sent as nnsight sends it, and received by a Python without the package: every signal is the one it is here."""
    nnsight = pytest.importorskip("nnsight")
    from nnsight.intervention.serialization import dumps

    nnsight.register(__name__)
    cases = [Case(method, "nnsight") for method in discover_methods()]
    controller = sum((case.controller for case in cases[1:]), start=cases[0].controller)
    host = host_of(cases[0].model)
    shapes = {site.point: host.shape(site) for loop in controller.loops for site in (loop.act, loop.sense)}
    shapes |= {summary.site.point: host.shape(summary.site) for loop in controller.loops for summary in loop.summaries}
    luggage = {"controller": controller, "check": check_loops, "try": steer_once, "shapes": shapes}
    luggage |= {
        "companion": Companion,
        "pass": Pass(controller.loops, record="all"),
        "path": str(tmp_path / "there.pt"),
    }
    (tmp_path / "sent").write_bytes(dumps(luggage))
    subprocess.run([sys.executable, "-c", ARRIVE, str(tmp_path / "sent")], check=True, cwd=tmp_path)
    steer_once(luggage | {"path": str(tmp_path / "here.pt")}, torch)
    here, there = (torch.load(tmp_path / name) for name in ("here.pt", "there.pt"))
    assert len(here) > 100
    assert set(here) == set(there)
    for name, pieces in here.items():
        for mine, theirs in zip(pieces, there[name], strict=True):
            torch.testing.assert_close(theirs, mine, equal_nan=True)
