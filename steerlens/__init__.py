"""Steering of language models as feedback control, for TransformerLens and nnsight.

with steer(model, lqr(model, pairs)) as run:
    model.generate("I think that", max_new_tokens=40)
"""

from __future__ import annotations

import sys

from steerlens import diagnose
from steerlens.control.linearization import Linearization, linearize
from steerlens.core import Condition, Controller, Gate, Law, Loop, Record, Setpoint, Site, Summary
from steerlens.core.package import Package
from steerlens.fit.contrast import Pairs, shipped
from steerlens.flow.fields import Field
from steerlens.flow.flows import Flow
from steerlens.gating import gate, schedule, when
from steerlens.hosts import remote
from steerlens.hosts.roles import roles
from steerlens.laws.conditions import Resemblance, Side
from steerlens.laws.feedback import Add, FactoredFeedback, Feedback, Pid, Preview, Project
from steerlens.laws.setpoints import Angle, Independent, Joint, Level, Point
from steerlens.methods import (
    ablation,
    actadd,
    angular,
    caa,
    cast,
    cold_fd,
    cold_kernel,
    hpr,
    inferaligner,
    iti,
    linear_act,
    lqr,
    mean_act,
    mimic,
    odesteer,
    pid,
    repe,
    sadi,
    tda,
    track,
)
from steerlens.sae import Feature, Target, describe, feature, hold, lead, rank_features, watch
from steerlens.steering import Run, apply, steer
from steerlens.version import __version__

sys.modules[__name__].__class__ = Package

__all__ = [
    "Add",
    "Angle",
    "Condition",
    "Controller",
    "FactoredFeedback",
    "Feature",
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
    "Pairs",
    "Pid",
    "Point",
    "Preview",
    "Project",
    "Record",
    "Resemblance",
    "Run",
    "Setpoint",
    "Side",
    "Site",
    "Summary",
    "Target",
    "__version__",
    "ablation",
    "actadd",
    "angular",
    "apply",
    "caa",
    "cast",
    "cold_fd",
    "cold_kernel",
    "describe",
    "diagnose",
    "feature",
    "gate",
    "hold",
    "hpr",
    "inferaligner",
    "iti",
    "lead",
    "linear_act",
    "linearize",
    "lqr",
    "mean_act",
    "mimic",
    "odesteer",
    "pid",
    "rank_features",
    "remote",
    "repe",
    "roles",
    "sadi",
    "schedule",
    "shipped",
    "steer",
    "tda",
    "track",
    "watch",
    "when",
]
