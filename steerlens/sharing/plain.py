"""What other libraries can express: constant vectors, added or clamped to, at every token."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

import torch
from torch import Tensor

from steerlens.core import Controller, Loop, Site
from steerlens.laws.feedback import Add, Feedback, Project
from steerlens.laws.setpoints import Level

#: Where other libraries steer: at every token, the first one too, which `"all"` leaves alone.
EVERY_TOKEN = slice(0, None)


def every_token(loop: Loop) -> bool:
    """Whether a loop acts at every token."""
    return isinstance(loop.where, slice) and loop.where.start in (None, 0) and loop.where.stop is None


def refuse(loop: Loop, words: str) -> NoReturn:
    """Raises ValueError for a loop that a format cannot express."""
    raise ValueError(f"loop {loop.name!r} at {loop.act} {words}")


def plain_loops(controller: Controller, form: str) -> list[Loop]:
    """The loops that do something, without gates and whatever else needs more than the state.

    Args:
        controller: What is exported.
        form: What it is written as, for the error.

    Raises:
        TypeError: not a controller.
        ValueError: nothing to write, or a loop with a gate, a schedule, a summary, a tangent or a reference.
    """
    if not isinstance(controller, Controller):
        raise TypeError(f"a {type(controller).__name__} cannot be written as {form}; give a Controller")
    loops = [loop for loop in controller.loops if loop.strength != 0]
    if not loops:
        raise ValueError(f"this controller does nothing: there is nothing to write as {form}")
    for loop in loops:
        for what, held in (("gate", loop.gates), ("schedule", loop.schedules)):
            if held:
                refuse(loop, f"has a {what}, which {form} cannot express")
        if loop.needs_more_than_state:
            refuse(loop, f"needs another pass of the model ({type(loop.law).__name__}), unlike {form}")
    return loops


def added(loop: Loop, form: str) -> Tensor:
    """The constant vector that a loop adds, strength included, of the site's shape, in float32 on the CPU.

    Raises:
        ValueError: its control is not constant.
    """
    if not isinstance(loop.law, Add):
        law = type(loop.law).__name__
        refuse(loop, f"is a {law}, whose control depends on the state; {form} only adds constant vectors")
    vector = loop.law.vector.detach().cpu().float()
    return vector * loop.strength if loop.strength != 1 else vector


def clamped(loop: Loop) -> tuple[Tensor, float] | None:
    """A unit direction and the level to which a loop sets the projection on it; None if it does something else.

    x <- x + (level - <d, x>) d
    """
    law = loop.law
    if isinstance(law, Project) and law.basis.shape[0] == 1 and loop.strength == 1:
        return _cpu(law.basis[0]), float((law.basis[0].double() * law.reference.double()).sum())
    if isinstance(law, Feedback) and isinstance(law.setpoint, Level):
        basis = law.setpoint.basis
        if law.gains.shape == basis.shape and torch.equal(law.gains * loop.strength, basis):
            return _cpu(basis[0]), float(law.setpoint.level)
    return None


def need_every_token(loop: Loop, form: str) -> None:
    """Raises ValueError unless a loop acts at every token."""
    if not every_token(loop):
        where = "the tokens of a mask" if isinstance(loop.where, Tensor) else f"the tokens {loop.where!r}"
        refuse(
            loop,
            f"steers {where}; {form} steers every token, the first one too: controller.at(slice(0, None)) does that",
        )


def merged(loops: Iterable[Loop], form: str) -> dict[Site, Tensor]:
    """What loops add at each site together, in the order of the forward pass."""
    found: dict[Site, Tensor] = {}
    for loop in sorted(loops, key=lambda loop: loop.act):
        need_every_token(loop, form)
        vector = added(loop, form)
        found[loop.act] = found[loop.act] + vector if loop.act in found else vector
    return found


def _cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().float()
