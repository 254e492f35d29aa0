"""Steering of language models as feedback control, for TransformerLens and nnsight.

with steer(model, lqr(model, pairs)) as run:
    model.generate("I think that", max_new_tokens=40)
"""

from __future__ import annotations

from steerlens import diagnose
from steerlens.contrast import Pairs, shipped
from steerlens.core import Controller, Law, Loop, Record, Setpoint, Site
from steerlens.fields import Field
from steerlens.flows import Flow
from steerlens.hosts import remote
from steerlens.laws import Add, FactoredFeedback, Feedback, Pid, Preview, Project
from steerlens.linearization import Linearization, linearize
from steerlens.methods import (
    ablation,
    actadd,
    angular,
    caa,
    cold_fd,
    cold_kernel,
    iti,
    linear_act,
    lqr,
    mean_act,
    mimic,
    odesteer,
    pid,
    repe,
    sadi,
    track,
)
from steerlens.sae import Feature, Target, describe, feature, hold, lead, rank_features, watch
from steerlens.setpoints import Angle, Independent, Joint, Level, Point
from steerlens.steering import Run, steer
from steerlens.version import __version__

__all__ = [
    "Add",
    "Angle",
    "Controller",
    "FactoredFeedback",
    "Feature",
    "Feedback",
    "Field",
    "Flow",
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
    "Run",
    "Setpoint",
    "Site",
    "Target",
    "__version__",
    "ablation",
    "actadd",
    "angular",
    "caa",
    "cold_fd",
    "cold_kernel",
    "describe",
    "diagnose",
    "feature",
    "hold",
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
    "sadi",
    "shipped",
    "steer",
    "track",
    "watch",
]
