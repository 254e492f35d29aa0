"""Features reached through the layers before them, with the least control: what `lqr` does with targets."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steerlens.control.linearization import Plant
from steerlens.control.lowrank import FeatureCostToGo
from steerlens.control.regulator import SOLVERS
from steerlens.core import Controller, Law, Loop, Site
from steerlens.core.progress import bar
from steerlens.core.types import Json, Where
from steerlens.fit.retune import Draft, edited
from steerlens.laws.feedback import Feedback
from steerlens.sae.feature import CONDITION, Target, moved, new_ranges
from steerlens.sae.setpoint import Feature

#: Where `lqr` measures features.
POINT = "resid_post"


def check_affine(targets: Sequence[Target]) -> None:
    """Raises ValueError for a target without a linear model: at another point, or of a normalised input."""
    for target in targets:
        if target.site.point != POINT:
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
            point, x = (POINT, path[t + 1]) if t in held else ("resid_pre", path[t])
            law = ahead.respond((rows if t in held else pulled).cpu().to(path), x, outputs, t)
            loops.append(Loop(law, Site(t, POINT), Site(t, point), where=where, strength=strength))
        else:
            cost.coast(pulled, features, math.inf)
        if before is not None:
            ahead = ahead.preceded_by(before)
            empty = path.new_zeros(len(features), len(features))
            energy, spent = torch.block_diag(empty, energy), torch.block_diag(empty, spent)
    # what other levels need, see `retune_reach`
    needs = {
        "base": ahead.base.tolist(),
        "energy": energy.tolist(),
        "spent": spent.tolist(),
        "norm": float(path[last + 1].norm()),
    }
    found = {
        "controller": f"{SOLVERS['output']} with preview",
        "targets": [target.arguments for target in targets],
        "acting": sorted(prices),
        "linearized_on": plant.n_texts,
        "needs": needs,
        "predicted_energy": _least(needs, ahead.labels, ahead.lower, ahead.upper, limit, targets[-1].site),
    }
    return Controller(sorted(loops, key=lambda loop: loop.act), found)


def retune_reach(draft: Draft) -> None:
    """Another level or range for features that the layers before them reach, within the limit of the fit.

    A gain does not depend on the level: each law has the ranges of the features that are still ahead.
    """
    by_site = new_ranges(draft)
    if not by_site:
        return
    layers = {Site.parse(site).layer: ends for site, ends in by_site.items()}

    def change(law: Any, loop: Loop) -> Law:
        ahead = [layers[layer] for layer in sorted(layers) if layer >= loop.act.layer]
        lower, upper = (list(itertools.chain(*sides)) for sides in zip(*ahead, strict=True))
        return edited(law, setpoint=moved(law.setpoint, lower, upper))

    draft.laws(change)
    # up to the first target all features are still ahead; without a loop there, not all ranges are known
    laws: list[Any] = [loop.law for loop in sorted(draft.loops, key=lambda loop: loop.act)]
    whole = laws[0].setpoint if laws else None
    if whole is None or len(whole.labels) < len(draft.found["needs"]["base"]):
        draft.found.pop("predicted_energy", None)
        return
    draft.found["predicted_energy"] = _least(
        draft.found["needs"], whole.labels, whole.lower, whole.upper, draft.arguments["limit"], Site(max(layers), POINT)
    )


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


def _least(needs: Json, labels: Sequence[str], lower: Tensor, upper: Tensor, limit: float | None, last: Site) -> float:
    """The control energy by the linear model on the mean path, `sum |u|^2`.

    Args:
        needs: Of the fit: pre-activations on the mean path `[m]`, the energy of a unit price and that of the control,
            `[m m]`, the norm of the state after the last target.
        labels: Of the features.
        lower, upper: Their ranges, `[m]`.
        limit: As for `lqr`.
        last: Of the last target.

    Raises:
        ValueError: more control than the limit.
    """
    base, energy, spent = (torch.tensor(needs[name], dtype=torch.float64) for name in ("base", "energy", "spent"))
    need = torch.minimum(torch.maximum(base, lower.to(base)), upper.to(base)) - base
    dual = torch.linalg.solve(energy, need)
    least = float(dual @ spent @ dual)
    share = math.sqrt(max(least, 0.0)) / needs["norm"]
    if limit is None or share <= limit:
        return least
    if len(base) == 1:
        z = float(base + need * limit / share)
        reach = f"it reaches {max(z, 0.0):.3g}"
    else:
        reach = f"it goes {limit / share:.0%} of the way"
    raise ValueError(
        f"feature {', '.join(labels)}: the level needs a control of {share:.2f} times the residual stream's norm "
        f"at {last} by the linear model of these texts; within the limit of {limit:g} {reach}. Ask for "
        "less, act at more layers, or pass limit=None"
    )
