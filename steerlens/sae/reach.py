"""Features reached through the layers before them, with the least control: what `lqr` does with targets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from steerlens.control.linearization import Plant
from steerlens.control.lowrank import FeatureCostToGo
from steerlens.control.regulator import SOLVERS
from steerlens.core import Controller, Loop, Site
from steerlens.core.progress import bar
from steerlens.core.types import Where
from steerlens.laws.feedback import Feedback
from steerlens.sae.feature import CONDITION, Target
from steerlens.sae.setpoint import Feature


def check_affine(targets: Sequence[Target]) -> None:
    """Raises ValueError for a target without a linear model: at another point, or of a normalised input."""
    for target in targets:
        if target.site.point != "resid_post":
            raise ValueError(
                f"lqr() needs a feature at a resid_post, this one is at {target.site}; use sae.hold() or pid()"
            )
        if target.setpoint.normalise != "none":
            raise ValueError(
                "lqr() needs an activation that is affine in the state, but the autoencoder normalises its input "
                f"({target.setpoint.normalise}); use sae.hold() or pid()"
            )


def acting_layers(targets: Sequence[Target], layers: list[int], *, named: bool) -> list[int]:
    """The layers that act: up to the last target, at least one of them at or before the first.

    Args:
        targets: In the order of their layers.
        layers: In order.
        named: The user named them, so that one after the last target is a mistake.

    Raises:
        ValueError: a named layer after the last target, a target that no layer can reach.
    """
    first, last = targets[0].site.layer, targets[-1].site.layer
    if named and layers[-1] > last:
        raise ValueError(f"layer {layers[-1]} comes after the feature's, {last}; give layers up to {last}")
    if layers[0] > first:
        raise ValueError(f"no layer acts at or before the feature at layer {first}; the first of layers is {layers[0]}")
    return [t for t in layers if t <= last]


def least_control(
    targets: Sequence[Target],
    plant: Plant,
    prices: Mapping[int, float],
    *,
    device: torch.device,
    where: Where,
    strength: float,
    limit: float | None,
    progress: bool,
) -> Controller:
    """The loops of the regulator whose cost is the control alone, with every target in its range as a constraint.

    Args:
        targets: In the order of their layers, at most one a layer, checked by `check_affine`.
        plant: The linear model.
        prices: r of each layer that acts, from `acting_layers`.
        device: Where to solve.
        where, strength, limit, progress: As for `lqr`.

    Raises:
        ValueError: the linear model needs more control than the limit, or cannot move the features apart.
    """
    # Apple's GPUs have no float64
    solve = torch.float32 if device.type == "mps" else torch.float64
    path = plant.states.cpu().double()
    held = {target.site.layer: target for target in targets}
    last = targets[-1].site.layer
    ahead = _Ahead(targets[-1], path, several=len(targets) > 1)
    cost = FeatureCostToGo(targets[-1].setpoint.sensor.to(device, solve), math.inf)
    loops = []
    energy = spent = path.new_zeros(len(ahead.base), len(ahead.base))
    for t in bar(range(last, min(prices) - 1, -1), desc="pulling back", progress=progress):
        rows, pulled = cost.Z, plant.pull(t, cost.Z)
        before = held.get(t - 1)
        features = cost.Z[:0] if before is None else before.setpoint.sensor.to(cost.Z)
        if t in prices:
            gram = (rows @ rows.T).cpu().to(path)
            energy, spent = energy + gram / prices[t], spent + gram / prices[t] ** 2
            outputs = cost.step(pulled, features, math.inf, prices[t]).cpu().to(path)
            # a layer with a target senses where it acts: that feature is measured, not predicted
            point, x = ("resid_post", path[t + 1]) if t in held else ("resid_pre", path[t])
            law = ahead.respond((rows if t in held else pulled).cpu().to(path), x, outputs, t)
            loops.append(Loop(law, Site(t, "resid_post"), Site(t, point), where=where, strength=strength))
        else:
            cost.coast(pulled, features, math.inf)
        if before is not None:
            ahead = ahead.preceded_by(before)
            empty = path.new_zeros(len(features), len(features))
            energy, spent = torch.block_diag(empty, energy), torch.block_diag(empty, spent)
    dual = torch.linalg.solve(energy, ahead.need)
    least = float(dual @ spent @ dual)
    _check_limit(targets, ahead, math.sqrt(max(least, 0.0)) / float(path[last + 1].norm()), limit)
    found = {
        "controller": f"{SOLVERS['output']} with preview",
        "targets": [target.arguments for target in targets],
        "acting": sorted(prices),
        "linearized_on": plant.n_texts,
        "predicted_energy": least,
    }
    return Controller(sorted(loops, key=lambda loop: loop.act), found)


class _Ahead:
    """The features that are still to be reached from a layer, those of the nearest target first."""

    def __init__(self, target: Target, path: Tensor, *, several: bool):
        setpoint, layer = target.setpoint, target.site.layer
        self.path = path
        self.several = several
        self.like = setpoint.sensor
        self.base = setpoint.sensor.to(path) @ path[layer + 1] + setpoint.bias.to(path)
        self.threshold, self.lower, self.upper = setpoint.threshold, setpoint.lower, setpoint.upper
        # with several layers an index alone would not be a name
        self.labels = [f"{label}at{layer}" for label in setpoint.labels] if several else list(setpoint.labels)

    @property
    def need(self) -> Tensor:
        """How far each pre-activation on the mean path is from its range, `[m]`."""
        return torch.minimum(torch.maximum(self.base, self.lower.to(self.base)), self.upper.to(self.base)) - self.base

    def preceded_by(self, target: Target) -> _Ahead:
        """These and the features of a target before them."""
        joined = _Ahead(target, self.path, several=True)
        for name in ("base", "threshold", "lower", "upper"):
            setattr(joined, name, torch.cat([getattr(joined, name), getattr(self, name)]))
        joined.labels += self.labels
        return joined

    def respond(self, rows: Tensor, x: Tensor, outputs: Tensor, t: int) -> Feedback:
        """The law that gives the control `(z* - z) @ outputs`, with z predicted by rows that go through `base` at x."""
        basis = rows / rows.norm(dim=-1, keepdim=True)
        if not torch.linalg.cond(basis) <= CONDITION:
            names = ", ".join(self.labels)
            raise ValueError(f"features {names} cannot be moved apart from layer {t}: their gradients are dependent")
        like = self.like
        predicted = Feature(
            rows.to(like),
            (self.base - rows @ x).to(like),
            self.threshold,
            self.lower,
            self.upper,
            basis.to(like),
            labels=self.labels,
        )
        return Feedback(predicted, (basis @ rows.T @ outputs).to(like).contiguous())


def _check_limit(targets: Sequence[Target], ahead: _Ahead, share: float, limit: float | None) -> None:
    if limit is None or share <= limit:
        return
    if len(ahead.base) == 1:
        z = float(ahead.base + ahead.need * limit / share)
        reach = f"it reaches {max(z, 0.0):.3g}"
    else:
        reach = f"it goes {limit / share:.0%} of the way"
    raise ValueError(
        f"feature {', '.join(ahead.labels)}: the level needs a control of {share:.2f} times the residual stream's norm "
        f"at {targets[-1].site} by the linear model of these texts; within the limit of {limit:g} {reach}. Ask for "
        "less, act at more layers, or pass limit=None"
    )
