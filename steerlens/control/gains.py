"""What `lqr` keeps of a regulator's solution, solved here or beside the weights on a server."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from steerlens.control.linearization import Blocks, Plant
from steerlens.control.regulator import FactoredGain, Weights, solve
from steerlens.hosts import Dimensions

#: What may be kept of a gain: K on the setpoint's basis, this and its two factors, this and K itself.
KEEP = ("rows", "factors", "matrices")


class Gains:
    """Gains of the controlled layers, of which nothing has the size of K unless it was asked for.

    Attributes:
        rows: By layer, K applied to the rows of the layer's basis, `[m d]`.
        factors: By layer, `inputs` and `outputs`, `[k d]` each, with `K = outputs' inputs`.
        features: By layer, the layer and index of the feature that each row of the factors belongs to.
        matrices: By layer, K, `[d d]`.
        states: Mean unsteered path of the last token, `[layer+1 d]`.
        n_texts: How many texts were averaged.
    """

    def __init__(self, states: Tensor, n_texts: int):
        self.states = states
        self.n_texts = n_texts
        self.rows: dict[int, Tensor] = {}
        self.factors: dict[int, tuple[Tensor, Tensor]] = {}
        self.features: dict[int, list[tuple[int, int]]] = {}
        self.matrices: dict[int, Tensor] = {}


def gains_of(
    plant: Plant,
    solver: str,
    weights: Weights,
    controlled: Collection[int],
    bases: Sequence[Tensor],
    *,
    device: torch.device,
    keep: str = "rows",
    progress: bool = False,
) -> Gains:
    """Solve the regulator of a plant; one gain exists at a time.

    Args:
        plant, solver, weights, controlled, device, progress: As for `solve`.
        bases: Directions of the setpoint before each block and after the last, `[m d]` each.
        keep: One of `KEEP`; the factors are those of `solver="output"`.
    """
    found: dict[int, Tensor] = {}
    factors: dict[int, tuple[Tensor, Tensor]] = {}
    features: dict[int, list[tuple[int, int]]] = {}
    matrices: dict[int, Tensor] = {}
    for t, gain in solve(solver, plant, weights, controlled, bases, device=device, progress=progress):
        like = bases[t]
        found[t] = gain.rows(like).to(like).cpu()
        if keep == "factors" and isinstance(gain, FactoredGain):
            factors[t] = gain.inputs.cpu(), gain.outputs.cpu()
            features[t] = gain.features
        elif keep == "matrices":
            matrices[t] = gain.matrix().to(like).cpu()
        del gain  # before the next one is computed
    gains = Gains(plant.states.cpu(), plant.n_texts)
    gains.rows, gains.factors, gains.features, gains.matrices = found, factors, features, matrices
    return gains


def gains_beside(
    place: Dimensions,
    tokens: Sequence[Sequence[int]],
    solver: str,
    weights: Weights,
    controlled: Sequence[int],
    bases: Sequence[Tensor],
    keep: str,
    progress: bool,
) -> Gains:
    """Linearise and solve where the weights are. Travels: what goes to a server are tokens, weights and bases, what
    comes back are rows and factors.

    Args:
        place: The model there.
        tokens: Token ids of the texts to linearise on.
        solver, weights, controlled, bases, keep, progress: As for `gains_of`.
    """
    plant = Blocks(place, tokens)
    return gains_of(plant, solver, weights, controlled, bases, device=place.device, keep=keep, progress=progress)
