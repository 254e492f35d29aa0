"""What the benchmarks share: the model, the texts, the clock."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import statistics
import time
from collections.abc import Callable

import torch


def seconds(call: Callable[[], object], device: str = "cpu") -> float:
    """CPU seconds of one call, or wall seconds on a GPU with its queue drained."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    call()
    return time.process_time() - start


def paired(calls: dict[str, Callable[[], object]], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Times of each call, one round after another; the order turns each round, so that none is always first."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for index in range(rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            times[name].append(seconds(calls[name], device))
    return times


def ratio(times: list[float], baseline: list[float]) -> float:
    """Median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(times, baseline, strict=True))
