"""What the benchmarks that compare methods share: the budget, the models, the Jacobians."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import steerlens as sl
from steerlens.core import Controller
from steerlens.evaluate import Arm, Bench, kl
from steerlens.fit.shipped import shipped_texts
from steerlens.models import gemma3, smollm2

#: The KL at which methods are compared, nats per token.
LIMIT = 0.3
MODELS = {"smollm2": smollm2, "gemma3": gemma3}


def jacobians(model: object, folder: Path) -> sl.Linearization:
    """A linearization on two neutral texts, kept in a folder."""
    file = folder / "plant.safetensors"
    if file.exists():
        return sl.Linearization.load(file)
    found = sl.linearize(model, shipped_texts("neutral", split="dev")[:2], progress=False)
    found.save(file)
    return found


def divergence(bench: Bench, controller: Controller, factor: float = 1.0) -> float:
    """Mean KL from the unsteered model, nats per token."""
    meter = kl()
    return meter.pool(meter(bench, Arm("found", controller, factor)))


def at_limit(
    bench: Bench, make: Callable[[float], Controller], dial: float, rounds: int, tolerance: float = 0.1
) -> tuple[Controller, float, float]:
    """What a function makes of a strength or level at which the KL is the limit; that level, and the KL.

    Give `lambda level: controller.retuned(level=level)`: it is called once a round, and a fit reads the texts.
    """
    for index in range(rounds):
        controller = make(dial)
        value = divergence(bench, controller)
        if abs(value / LIMIT - 1) < tolerance or index == rounds - 1:
            break
        # a small control has a KL that grows with its square
        dial *= min(max(math.sqrt(LIMIT / value), 0.25), 4.0)
    return controller, dial, value
