"""What a computation holds in memory, counted by torch and not by the operating system."""

from __future__ import annotations

from collections.abc import Callable

import torch


def peak(call: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator held at any time during a call beyond what it held before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        kept = call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    del kept
    return most
