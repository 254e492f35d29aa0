"""Steering of language models as feedback control, for TransformerLens and nnsight.

with steer(model, lqr(model, pairs)) as run:
    model.generate("I think that", max_new_tokens=40)
"""

from __future__ import annotations

import sys

from steerlens import diagnose, evaluate, methods, sae, sharing
from steerlens.control.linearization import Linearization, linearize
from steerlens.core import Condition, Controller, Gate, Law, Loop, Now, Record, Setpoint, Signals, Site, Summary
from steerlens.core.package import Package
from steerlens.evaluate import calibrate, compare, prompt, separation, sweep
from steerlens.fit.contrast import Pairs
from steerlens.fit.method import exported
from steerlens.fit.shipped import shipped, shipped_texts
from steerlens.flow.fields import Field
from steerlens.flow.flows import Flow
from steerlens.gating import gate, schedule, when
from steerlens.hosts import remote
from steerlens.hosts.readings import readings
from steerlens.hosts.roles import roles
from steerlens.laws.conditions import Probability, Ramp, Resemblance, Side
from steerlens.laws.feedback import Add, FactoredFeedback, Feedback, Pid, Preview, Project
from steerlens.laws.setpoints import Angle, Independent, Joint, Level, Point, Range
from steerlens.laws.single import add, observe, project_out
from steerlens.methods import *  # noqa: F403 (each method is exported there, in one line)
from steerlens.showing import show
from steerlens.steering import Run, apply, clear, runs, steer
from steerlens.version import __version__

sys.modules[__name__].__class__ = Package

__all__ = [
    "Add",
    "Angle",
    "Condition",
    "Controller",
    "FactoredFeedback",
    "Feedback",
    "Field",
    "Flow",
    "Gate",
    "Independent",
    "Joint",
    "Law",
    "Level",
    "Linearization",
    "Loop",
    "Now",
    "Pairs",
    "Pid",
    "Point",
    "Preview",
    "Probability",
    "Project",
    "Ramp",
    "Range",
    "Record",
    "Resemblance",
    "Run",
    "Setpoint",
    "Side",
    "Signals",
    "Site",
    "Summary",
    "__version__",
    "add",
    "apply",
    "calibrate",
    "clear",
    "compare",
    "diagnose",
    "evaluate",
    "gate",
    "linearize",
    "observe",
    "project_out",
    "prompt",
    "readings",
    "remote",
    "roles",
    "sae",
    "schedule",
    "separation",
    "sharing",
    "shipped",
    "shipped_texts",
    "show",
    "runs",
    "steer",
    "sweep",
    "when",
    *exported(methods),
]
