"""Steering methods, one function in one file each; the file is named like its function."""

from __future__ import annotations

from steerlens.methods.ablation import ablation
from steerlens.methods.actadd import actadd
from steerlens.methods.angular import angular
from steerlens.methods.caa import caa
from steerlens.methods.cast import cast
from steerlens.methods.cold_fd import cold_fd
from steerlens.methods.cold_kernel import cold_kernel
from steerlens.methods.hpr import hpr
from steerlens.methods.inferaligner import inferaligner
from steerlens.methods.iti import iti
from steerlens.methods.linear_act import linear_act
from steerlens.methods.lqr import lqr
from steerlens.methods.mean_act import mean_act
from steerlens.methods.mimic import mimic
from steerlens.methods.odesteer import odesteer
from steerlens.methods.pid import pid
from steerlens.methods.repe import repe
from steerlens.methods.sadi import sadi
from steerlens.methods.tda import tda
from steerlens.methods.track import track

__all__ = [
    "ablation",
    "actadd",
    "angular",
    "caa",
    "cast",
    "cold_fd",
    "cold_kernel",
    "hpr",
    "inferaligner",
    "iti",
    "linear_act",
    "lqr",
    "mean_act",
    "mimic",
    "odesteer",
    "pid",
    "repe",
    "sadi",
    "tda",
    "track",
]
