"""Steering of language models as feedback control, for TransformerLens and nnsight.

with steer(model, lqr(model, pairs)) as run:
    model.generate("I think that", max_new_tokens=40)
"""

from __future__ import annotations

from steerlens.contrast import Pairs, shipped
from steerlens.core import Controller, Law, Loop, Record, Setpoint, Site
from steerlens.hosts import remote
from steerlens.laws import Add, Feedback, Project
from steerlens.linearization import Linearization, linearize
from steerlens.methods import ablation, actadd, caa, cold_kernel, lqr, sadi
from steerlens.setpoints import Level
from steerlens.steering import Run, steer
from steerlens.version import __version__

__all__ = [
    "Add",
    "Controller",
    "Feedback",
    "Law",
    "Level",
    "Linearization",
    "Loop",
    "Pairs",
    "Project",
    "Record",
    "Run",
    "Setpoint",
    "Site",
    "__version__",
    "ablation",
    "actadd",
    "caa",
    "cold_kernel",
    "linearize",
    "lqr",
    "remote",
    "sadi",
    "shipped",
    "steer",
]
