"""Measures arms on meters, one after another, and keeps what is known already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from steerlens.core.progress import counting
from steerlens.evaluate.bench import Arm, Bench
from steerlens.evaluate.evaluation import DOSE, RANDOM_NAME, UNSTEERED_NAME, Measured
from steerlens.evaluate.log import Log, digest, setting
from steerlens.evaluate.meter import Meter, Values


@dataclass(frozen=True)
class Entry:
    """An arm that is built only if something is still to be measured on it.

    Args:
        name, strength, seed: As of `Arm`.
        build: Gives the arm. Its own strength is what the controller is scaled by.
        layer: Where it acts, in a sweep over layers; else None.
        dealt: Number of arms of this name and strength that share the items of what is a matter of their mean, such as
            the KL, by their seeds; 1: it has all items.
    """

    name: str
    build: Callable[[], Arm]
    strength: float
    seed: int = 0
    layer: int | None = None
    dealt: int = 1


class Session:
    """Runs meters on arms.

    Args:
        bench: The model and the prompts.
        meters: The effect first.
        log: What is known, and where it goes.
        progress: Show a bar with the time left.
    """

    def __init__(self, bench: Bench, meters: Sequence[Meter], log: Log, *, progress: bool):
        self.bench, self.meters, self.log, self.progress = bench, list(meters), log, progress
        self.about: dict[str, dict[str, Any]] = {meter.name: meter.describe() for meter in meters}

    def run(self, entries: Sequence[Entry]) -> tuple[Measured, ...]:
        """All numbers of these arms.

        Raises:
            RuntimeError: an arm of strength 0 differs from the unsteered one; a controller changes no logit.
        """
        found: list[Measured] = []
        names = [f"{entry.name} {entry.strength:.3g}" for entry in entries]
        with counting(len(entries) * (len(self.meters) + 1), desc="measuring", progress=self.progress) as shown:
            for name, entry in zip(names, entries, strict=True):
                shown.set_description(name)
                found += self._arm(entry, shown.update)
        return tuple(found)

    def _arm(self, entry: Entry, tick: Callable[[], Any]) -> list[Measured]:
        built: list[Arm] = []

        def arm() -> Arm:
            if not built:
                built.append(entry.build())
            return built[0]

        found: dict[str, Values] = {}
        parts: dict[str, tuple[int, int]] = {}
        for meter in self._for(entry):
            parts[meter.name] = start, step = self._part(entry, meter)
            own = meter if step == 1 else replace(meter, items=meter.over(self.bench)[start::step])
            found[meter.name] = self._known(entry, meter.name, lambda own=own: own(self.bench, arm()))  # type: ignore[misc]
            tick()
        if not self._again(entry):
            found[DOSE] = self._known(entry, DOSE, lambda: self.bench.dose(arm()))
        tick()
        self._check(entry, found, parts)
        place = (entry.name, entry.strength, entry.seed)
        return [Measured(*place, name, values, entry.layer, *parts.get(name, (0, 1))) for name, values in found.items()]

    def _part(self, entry: Entry, meter: Meter) -> tuple[int, int]:
        """The items of a meter that an arm is measured on: the first one, and how far it is to the next."""
        shared = entry.dealt > 1 and meter is not self.meters[0] and meter.needs == "logits"
        return (entry.seed, entry.dealt) if shared and len(meter.over(self.bench)) >= entry.dealt else (0, 1)

    @staticmethod
    def _again(entry: Entry) -> bool:
        """Whether it is a random direction after the first, which have the norms of the first."""
        return entry.name == RANDOM_NAME and entry.seed > 0

    def _for(self, entry: Entry) -> list[Meter]:
        # likelihoods are cheap; random directions after the first write texts only if texts are the aim
        if not self._again(entry):
            return self.meters
        return [meter for number, meter in enumerate(self.meters) if number == 0 or meter.needs == "logits"]

    def _known(self, entry: Entry, name: str, measure: Callable[[], Values]) -> Values:
        key = [entry.name, entry.strength, entry.seed, name]
        return self.log[key] if key in self.log else self.log.put(key, measure())

    def _check(self, entry: Entry, found: dict[str, Values], parts: dict[str, tuple[int, int]]) -> None:
        """Compare an arm with the unsteered one."""
        if entry.name == UNSTEERED_NAME:
            return
        plain = {name: self.log[[UNSTEERED_NAME, 0.0, 0, name]][start::step] for name, (start, step) in parts.items()}
        exact = [meter.name for meter in self.meters if meter.needs == "logits"]
        changed = [name for name in plain if found[name] != plain[name]]
        if entry.strength == 0 and changed:
            raise RuntimeError(f"{entry.name} at strength 0 differs from the unsteered model on {', '.join(changed)}")
        if entry.strength != 0 and exact and not set(exact) & set(changed):
            raise RuntimeError(
                f"{entry.name} at strength {entry.strength:g} changes no scored logit: every number equals the "
                "unsteered model's. Does its `where` name tokens of the completions, and do its gates open here?"
            )


def protocol_of(bench: Bench, meters: Sequence[Meter]) -> dict[str, Any]:
    """What the numbers depend on besides the arms, as plain JSON."""
    return setting(bench.host) | {
        "seed": bench.seed,
        "prompts": {"count": len(bench.prompts), "digest": digest(bench.prompts)},
        "texts": {
            "max_new_tokens": bench.max_new_tokens,
            "temperature": bench.temperature,
            "samples": bench.samples,
        },
        "batch": bench.batch,
        "meters": [meter.describe() for meter in meters],
    }
