"""What a computation costs in counts, which are the same on every machine: torch operations and Python calls."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from steerlens.testing.case import Case


class Counts(NamedTuple):
    """Counts of a computation, or differences of such.

    Attributes:
        operations: Of torch, as they reach the dispatcher.
        calls: Of Python functions; calls of C functions are not counted.
    """

    operations: float
    calls: float


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def count(call: Callable[[], object]) -> Counts:
    """Torch operations and Python calls of a computation, each counted in a run of its own."""
    with _Operations() as operations:
        call()
    calls = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    collects, before = gc.isenabled(), sys.getprofile()
    gc.disable()  # finalisers are called whenever the collector runs
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
        if collects:
            gc.enable()
    return Counts(operations.count, calls)


def count_per_token(generate: Callable[[int], object], *, tokens: int = 4) -> Counts:
    """Counts of one more generated token, from generations of two lengths: the prompt and what comes once drop out.

    Args:
        generate: Generates the number of tokens that it is given.
        tokens: How many more the longer generation has.
    """
    generate(2)  # what is done once for a model
    short, long = count(lambda: generate(2)), count(lambda: generate(2 + tokens))
    return Counts((long.operations - short.operations) / tokens, (long.calls - short.calls) / tokens)


def counts_of_steering(case: Case, *, record: Any = None) -> Counts:
    """Counts per generated token under the case's controller, less those without one; attaching is not counted.

    Args:
        case: Of a method on a host.
        record: What is recorded meanwhile, see `steer`.
    """
    ids = torch.tensor([case.prompt])
    plain = count_per_token(lambda tokens: case.generate(ids, tokens))
    with case.steer(record=record):
        steered = count_per_token(lambda tokens: case.generate(ids, tokens))
    return Counts(steered.operations - plain.operations, steered.calls - plain.calls)
