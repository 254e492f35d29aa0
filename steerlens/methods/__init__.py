"""Steering methods, one function in one file each, named like the file; one line here exports it."""

from steerlens.methods.ablation import ablation as ablation
from steerlens.methods.actadd import actadd as actadd
from steerlens.methods.alphasteer import alphasteer as alphasteer
from steerlens.methods.angular import angular as angular
from steerlens.methods.caa import caa as caa
from steerlens.methods.cast import cast as cast
from steerlens.methods.cold_fd import cold_fd as cold_fd
from steerlens.methods.cold_kernel import cold_kernel as cold_kernel
from steerlens.methods.hold import hold as hold
from steerlens.methods.hpr import hpr as hpr
from steerlens.methods.inferaligner import inferaligner as inferaligner
from steerlens.methods.iti import iti as iti
from steerlens.methods.linear_act import linear_act as linear_act
from steerlens.methods.lqr import lqr as lqr
from steerlens.methods.mean_act import mean_act as mean_act
from steerlens.methods.mimic import mimic as mimic
from steerlens.methods.odesteer import odesteer as odesteer
from steerlens.methods.pid import pid as pid
from steerlens.methods.pid_steering import pid_steering as pid_steering
from steerlens.methods.repe import repe as repe
from steerlens.methods.sadi import sadi as sadi
from steerlens.methods.tda import tda as tda
from steerlens.methods.track import track as track
from steerlens.methods.trained_vector import trained_vector as trained_vector
