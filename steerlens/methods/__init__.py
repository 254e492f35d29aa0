"""Steering methods, one function in one file each; the file is named like its function."""

from __future__ import annotations

from steerlens.methods.ablation import ablation
from steerlens.methods.actadd import actadd
from steerlens.methods.caa import caa
from steerlens.methods.cold_kernel import cold_kernel
from steerlens.methods.lqr import lqr
from steerlens.methods.odesteer import odesteer
from steerlens.methods.pid import pid
from steerlens.methods.sadi import sadi
from steerlens.methods.track import track

__all__ = ["ablation", "actadd", "caa", "cold_kernel", "lqr", "odesteer", "pid", "sadi", "track"]
