"""Can the feedback be trusted? How linear the blocks are, how well a loop is predicted, what its gains do."""

from __future__ import annotations

from steerlens.diagnose.bound import Lyapunov, tracking_bound
from steerlens.diagnose.closed_loop import ClosedLoop, closed_loop
from steerlens.diagnose.linearity import Linearity, linearity, similarity
from steerlens.diagnose.reach import Reach, reach
from steerlens.diagnose.tracking import Tracking, tracking

__all__ = [
    "ClosedLoop",
    "Linearity",
    "Lyapunov",
    "Reach",
    "Tracking",
    "closed_loop",
    "linearity",
    "reach",
    "similarity",
    "tracking",
    "tracking_bound",
]
