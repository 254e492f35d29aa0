"""Numbers that a law can compute with. Travels to servers, where `apply` checks its controller."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from steerlens.core.law import Loop
from steerlens.core.part import Part

#: Largest float32: laws compute in it.
LARGEST = 3.4028234663852886e38


def check_numbers(loops: Sequence[Loop]) -> None:
    """Raises ValueError for a tensor or number in a loop that is not finite in float32, with its name and the site."""
    for loop in loops:
        check_finite(loop.strength, f"the strength of the loop at {loop.act}")
        for part in loop.parts:
            check_finite(part, f"the {type(part).__name__} at {loop.act}")


def check_finite(value: Any, what: str, unbounded: bool = False) -> None:
    """Raises ValueError unless all numbers in a part, list, tensor or number are finite in float32.

    Args:
        what: Its name, for the message.
        unbounded: Infinity is allowed, as for the attributes that `Part.unbounded` names; NaN never is.
    """
    if isinstance(value, Part):
        for name, entry in vars(value).items():
            check_finite(entry, f"{what}.{name}", name in type(value).unbounded)
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            check_finite(entry, f"{what}[{index}]", unbounded)
    elif isinstance(value, Tensor):
        if value.is_floating_point() and value.numel() and not value.is_meta:
            _check(float(value.detach().abs().max()), what, unbounded)  # NaN is the maximum where there is one
    elif isinstance(value, float):
        _check(abs(value), what, unbounded)


def _check(size: float, what: str, unbounded: bool) -> None:
    if not (size <= LARGEST or (unbounded and not math.isnan(size))):
        raise ValueError(f"{what} holds {size:g}; the numbers of a controller must be finite in float32")
