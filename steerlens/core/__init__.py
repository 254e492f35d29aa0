"""The nouns: sites, setpoints, laws, loops, controllers, and the pass that runs them. Knows no model library."""

from __future__ import annotations

from steerlens.core.aside import Companion
from steerlens.core.check import check_lengths, check_loops, check_record
from steerlens.core.controller import Controller
from steerlens.core.law import Law, Loop, Setpoint, Signals
from steerlens.core.now import Now
from steerlens.core.part import Part, map_tensors, tensors_of
from steerlens.core.passing import Display, Pass
from steerlens.core.positions import PROMPT_ONLY, Positions, check_where
from steerlens.core.prompt import Condition, Direction, Gate, Schedule, Summary
from steerlens.core.record import Record
from steerlens.core.sequence import Sequence
from steerlens.core.signals import SiteSignals, name_signals
from steerlens.core.sites import POINTS, Site
from steerlens.core.span import Span

__all__ = [
    "POINTS",
    "PROMPT_ONLY",
    "Companion",
    "Condition",
    "Controller",
    "Direction",
    "Display",
    "Gate",
    "Law",
    "Loop",
    "Now",
    "Part",
    "Pass",
    "Positions",
    "Record",
    "Schedule",
    "Sequence",
    "Setpoint",
    "Signals",
    "Site",
    "SiteSignals",
    "Span",
    "Summary",
    "check_lengths",
    "check_loops",
    "check_record",
    "check_where",
    "map_tensors",
    "name_signals",
    "tensors_of",
]
