"""Diagnosis: whether the feedback can be trusted, which control caused an effect, and which components carry it."""

from __future__ import annotations

from steerlens.diagnose.attribution import Attribution, attribute
from steerlens.diagnose.bound import Lyapunov, tracking_bound
from steerlens.diagnose.carriers import carriers
from steerlens.diagnose.closed_loop import ClosedLoop, closed_loop
from steerlens.diagnose.components import Components
from steerlens.diagnose.direct import direct
from steerlens.diagnose.linearity import Linearity, linearity, similarity
from steerlens.diagnose.metrics import logit_difference
from steerlens.diagnose.reach import Reach, reach
from steerlens.diagnose.tracking import Tracking, tracking

__all__ = [
    "Attribution",
    "ClosedLoop",
    "Components",
    "Linearity",
    "Lyapunov",
    "Reach",
    "Tracking",
    "attribute",
    "carriers",
    "closed_loop",
    "direct",
    "linearity",
    "logit_difference",
    "reach",
    "similarity",
    "tracking",
    "tracking_bound",
]
