"""What `lqr` keeps of a regulator's solution, solved here or on the server that has the weights."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from steerlens.control.linearization import Blocks, Linearization, Plant, over
from steerlens.control.regulator import FactoredGain, Weights, solve
from steerlens.control.targets import Targets
from steerlens.core import Law
from steerlens.hosts import Dimensions, Host, UntrustedError
from steerlens.laws.feedback import Feedback, Preview

#: What may be kept of a gain: K on the setpoint's basis, this and its two factors, this and K itself.
KEEP = ("rows", "factors", "matrices")


class Gains:
    """Gains of the controlled layers, of which nothing has the size of K unless it was asked for.

    Attributes:
        rows: By layer, K applied to the rows of the layer's basis, `[m d]`.
        factors: By layer, `inputs` and `outputs`, `[k d]` each, with `K = outputs' inputs`.
        features: By layer, the layer and index of the feature that each row of the factors belongs to.
        matrices: By layer, K, `[d d]`.
        states: Mean unsteered path of the last token, `[layer+1 d]`; of width 0 if tangents came from differences.
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
    gains = Gains(plant.states.cpu(), plant.n_texts)
    for t, gain in solve(solver, plant, weights, controlled, bases, device=device, progress=progress):
        like = bases[t]
        gains.rows[t] = gain.rows(like).to(like).cpu()
        if keep == "factors" and isinstance(gain, FactoredGain):
            gains.factors[t] = gain.inputs.cpu(), gain.outputs.cpu()
            gains.features[t] = gain.features
        elif keep == "matrices":
            gains.matrices[t] = gain.matrix().to(like).cpu()
        del gain  # before the next one is computed
    return gains


def gains_for(
    host: Host,
    tokens: Sequence[Sequence[int]],
    solver: str,
    weights: Weights,
    controlled: Sequence[int],
    bases: Sequence[Tensor],
    *,
    linearization: Linearization | None = None,
    keep: str = "rows",
    progress: bool = False,
) -> Gains:
    """Linearise a model and solve its regulator, here or where the weights are.

    On a server that trusts its user the blocks are linearised and the regulator is solved there; what comes back are
    rows and factors, nothing of size d^2. On one that does not, `solver="scalar"` takes tangents by central differences
    in one forward pass a text, see `Host.tangents`.

    Args:
        host: Of the model; a `steerlens.remote` one computes on its server.
        tokens: Token ids of the texts to linearise on.
        linearization: Jacobians to use instead of the texts.
        solver, weights, controlled, bases, keep, progress: As for `gains_of`.

    Raises:
        ValueError: K itself is requested from a server.
        UntrustedError: the server keeps requests apart from the weights, and the solver needs them.
    """
    if linearization is not None:
        return gains_of(
            linearization, solver, weights, controlled, bases, device=host.device, keep=keep, progress=progress
        )
    if not host.remote:
        blocks = Blocks(host, tokens)
        return gains_of(blocks, solver, weights, controlled, bases, device=host.device, keep=keep, progress=progress)
    if keep == "matrices":
        raise ValueError(
            "the gains as matrices, [d d] a layer, do not come back from a server; leave out full_gain, and track with "
            "solver='output'"
        )
    try:
        return host.beside(gains_beside, tokens, solver, weights, controlled, bases, keep)
    except UntrustedError:
        if solver != "scalar":
            raise
    plant = Tangents(host, tokens, {t: bases[t] for t in controlled}, progress=progress)
    return gains_of(plant, solver, weights, controlled, bases, device=host.device, keep=keep)


def gains_beside(
    place: Dimensions,
    tokens: Sequence[Sequence[int]],
    solver: str,
    weights: Weights,
    controlled: Sequence[int],
    bases: Sequence[Tensor],
    keep: str,
) -> Gains:
    """Linearise and solve where the weights are; travels.

    Args:
        place: The model there.
        tokens, solver, weights, controlled, bases, keep: As for `gains_for`.
    """
    return gains_of(Blocks(place, tokens), solver, weights, controlled, bases, device=place.device, keep=keep)


class Tangents(Plant):
    """Tangents of known directions by central differences, the mean over some texts: all that the scalar solver needs.

    Args:
        host: Takes the differences.
        tokens: Token ids of the texts.
        directions: By block, `[m d]`.
        progress: Show a progress bar over the texts, each of which is one request to a server.
    """

    def __init__(
        self,
        host: Host,
        tokens: Sequence[Sequence[int]],
        directions: dict[int, Tensor],
        *,
        progress: bool = False,
    ):
        self.n_texts = len(tokens)
        self.states = torch.zeros(host.n_layers + 1, 0)
        found = [host.tangents(text, directions) for text in over(tokens, "differences on the server", progress)]
        self._pushed = {t: torch.stack([each[t] for each in found]).mean(0) for t in directions}

    @property
    def dtype(self) -> torch.dtype:
        """float32."""
        return torch.float32

    def push(self, t: int, rows: Tensor) -> Tensor:
        """`rows @ A_t'`, for the directions of the block only."""
        return self._pushed[t].to(rows)


def react(t: int, gains: Gains, targets: Targets) -> Law:
    """Feedback on the error before block t: `u = c @ (basis @ K')`."""
    return Feedback(targets.setpoints[t], gains.rows[t], matrix=gains.matrices.get(t))


def foresee(t: int, gains: Gains, targets: Targets) -> Law:
    """Feedback on the later layers' errors, as the linear model predicts them without further control."""
    inputs, outputs = gains.factors[t]
    path = gains.states.to(inputs)
    # of a deviation from the token's own path the linear prediction has no constant
    ahead = inputs.new_zeros(len(inputs)) if targets.own else inputs @ path[t]
    for row, (s, i) in enumerate(gains.features[t]):
        ahead[row] += targets.levels(s)[i].to(path)
        if not targets.own:
            ahead[row] -= targets.setpoints[s].basis[i].to(path) @ path[s]
    setpoint = targets.setpoints[t]
    return Preview(setpoint, *(part.to(setpoint.basis).contiguous() for part in (inputs, ahead, outputs)))
