"""AlphaSteer: a vector added in proportion to what benign prompts do not share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from steerlens.core import Controller, Loop
from steerlens.core.types import Layers, Where
from steerlens.fit.card import VECTORS, Card
from steerlens.fit.contrast import Pairs
from steerlens.fit.method import method
from steerlens.fit.reading import check_contrast, check_vectors, contrast_means, contrast_states, pick_layers, unit
from steerlens.hosts.types import Model
from steerlens.laws.along import Sensed

#: Mean score of the texts to be steered below which nothing is steered.
LEAST = 1e-3


@method(card=Card(needs="sets", points=VECTORS))
def alphasteer(
    model: Model,
    data: Pairs,
    *,
    condition: Pairs | None = None,
    share: float = 0.5,
    ridge: float = 10.0,
    layers: Layers = None,
    point: str = "resid_post",
    strength: float = 2.0,
    where: Where = "last",
) -> Controller:
    """Add a vector to states that resemble some texts, and, by a null-space constraint, nothing to those of others.

        u = s Delta P x,   P the projector onto the null space of the benign states
        Delta = argmin sum_i |Delta P x_i - v|^2 + ridge |Delta P|^2   over the states x_i that are to be steered

    Every x_i has the same target v, so that the optimum has rank one: `Delta P = v g'`, and a dot product and a vector
    addition per token are all that is left of the matrix:

        u = s <g, x> v,   g = P X' (X P X' + ridge I)^-1 1,   X: [text d]

    <g, x> is near 1 where steering is wanted and 0 on the benign states that were read.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model.
        data: Contrast texts for v, their mean difference: those of the wanted behaviour (in the paper, refusal)
            against the others. `Pairs.read` selects the token whose activation is x.
        condition: Contrast texts for Delta and P: positive ones to be steered (malicious prompts), negative ones to be
            left alone (benign prompts), many of them. Default: those of `data`.
        share: At least this share of the d directions counts as null space, those along which the benign states are
            smallest. 0: only those without any benign activation, which more than d texts hardly leave. The authors
            take 0.3 to 0.6, layer by layer. The larger, the more of the benign states leaks into the control.
        ridge: Weight of the penalty on Delta P, in squared activation units.
        layers: Where to act; default the middle layer (the authors: some ten, from a quarter to two thirds of the
            depth).
        point: Point of the block, see `Site`.
        strength: s, no unit; 1 adds the whole class difference to what is to be steered, 2 has a side effect near
            that of the other methods' defaults.
        where: Token positions, see `Loop`.

    Returns:
        One loop per layer. The recipe holds, for each layer, the dimension of the null space and the mean of <g, x> on
        both sides of the condition. Recorded signals: `score` `[batch pos]`, <g, x>, no unit; `u`; `u_norm`.

    Raises:
        TypeError: a condition that is not `Pairs`.
        ValueError: a share outside [0, 1], a ridge that is not positive; a layer or point the model does not have;
            sides with identical activations at a layer; a null space in which the texts to be steered have hardly
            an activation.

    Source: Sheng et al. (arXiv 2506.07022). Differences from the authors' code: the state of each
    steered token is used, where the code adds, once and to the whole prompt, the control of the prompt's last token;
    the null space is at least the directions without benign activation, and `share` a floor under it; the solution is
    that of their pseudoinverse, of which the rank is used. Not reproduced: the refusal rates of the paper;
    a share for each layer, chosen on jailbreaks.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share}; it lies between 0 and 1")
    if not (ridge > 0 and math.isfinite(ridge)):
        raise ValueError(f"ridge={ridge}; it must be positive and finite")
    check_vectors("alphasteer", point)
    examples = data if condition is None else condition
    check_contrast(examples)
    sites = pick_layers(model, layers, point, default="middle")
    positive, negative = contrast_means(model, data, sites)
    loops, sizes, scores = [], [], []
    for site, (steered, benign) in contrast_states(model, examples, sites).items():
        v = positive[site] - negative[site]
        unit(v, site)
        rows = null_space_complement(benign, share)
        g = sensor(steered.double(), rows, ridge)
        sizes.append(v.numel() - len(rows))
        scores.append([float((side.double() @ g).mean()) for side in (steered, benign)])
        if not scores[-1][0] > LEAST:
            raise ValueError(
                f"the texts to be steered have hardly an activation in the null space at {site}: their mean score is "
                f"{scores[-1][0]:.1g}; give fewer benign texts, a larger share, or a smaller ridge"
            )
        loops.append(Loop(Sensed(v, g.to(v.dtype)), site, where=where, strength=strength))
    return Controller(loops, {"null_space": sizes, "scores": scores})


def null_space_complement(benign: Tensor, share: float) -> Tensor:
    """Orthonormal rows V `[r d]` with `P = I - V'V`: the directions along which the benign states `[n d]` are large."""
    _, values, rows = torch.linalg.svd(benign.double(), full_matrices=False)
    # what the states' own precision cannot tell from zero, as in numpy's matrix_rank
    floor = values.max() * max(benign.shape) * torch.finfo(benign.dtype).eps
    rank = min(int((values > floor).sum()), math.floor((1 - share) * benign.shape[1]))
    return rows[:rank]


def sensor(states: Tensor, rows: Tensor, ridge: float) -> Tensor:
    """`P X' (X P X' + ridge I)^-1 1`, `[d]`, for states X `[n d]` and `P = I - V'V`, float64."""
    inside = states - (states @ rows.T) @ rows
    # projected twice: rounding of the first leaves a trace of the large benign directions
    inside = inside - (inside @ rows.T) @ rows
    gram = inside @ inside.T
    gram.diagonal().add_(ridge)
    return inside.T @ torch.linalg.solve(gram, torch.ones(len(states), dtype=states.dtype))
