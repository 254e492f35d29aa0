"""Inference-time intervention: shift the attention heads that separate the two sides."""

from __future__ import annotations

from typing import Literal

import torch

from steerlens.core import Controller, Loop
from steerlens.core.types import Layers, Where
from steerlens.fit.card import Card
from steerlens.fit.contrast import Pairs
from steerlens.fit.heads import head_accuracy, head_shift
from steerlens.fit.method import method
from steerlens.fit.reading import contrast_states, pick_layers
from steerlens.hosts.types import Model
from steerlens.laws.feedback import Add


@method(card=Card(needs="sets", points=("z",)), paper={"strength": 15.0})
def iti(
    model: Model,
    data: Pairs,
    *,
    layers: Layers = None,
    n_elements: int | None = None,
    strength: float = 5.0,
    direction: Literal["mean", "probe"] = "mean",
    held_out: float = 0.2,
    seed: int = 0,
    where: Where = "last",
    paper: bool = False,
) -> Controller:
    """Add a direction to the attention heads in which a linear probe separates the two sides best.

        u_h = alpha sigma_h v_h   for the K heads of highest probe accuracy, 0 for the others

    v_h is the unit difference of the means of a head's output before the output projection, sigma_h the standard
    deviation of `<v_h, z_h>` over all texts.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model.
        data: Contrast texts; `Pairs.read` selects the token whose activation is z.
        layers: Where heads may be chosen; default all.
        n_elements: K, over all layers; default a twentieth of the heads, as the paper's 48 of 1024.
        strength: alpha, in standard deviations. The default has a KL of about 0.3 nats per token on SmolLM2, 15 (the
            paper) one of 3.6.
        direction: v: `"mean"` (difference of means) or `"probe"` (weights of a logistic regression on all texts).
        held_out: Share of each side's texts on which the probes are compared, one text at least.
        seed: Of the choice of these texts.
        where: Token positions, see `Loop`.
        paper: Take the paper's strength, if none is given.

    Returns:
        One loop per layer with a chosen head, at `z` `[batch pos head d_head]` (query heads). The recipe holds the
        heads as `[layer, head]` with their accuracies, the best first, heads of equal accuracy in the order of the
        forward pass.
        Recorded signals: `u`, `u_norm`.

    Raises:
        ValueError: a layer the model does not have; more heads than there are; fewer than two texts on a side; a chosen
            head with identical activations on both sides; a model whose heads cannot be reached.

    Source: Li et al. (arXiv 2306.03341). The authors take sigma over texts of its own and act on the first row of a
    batch only; with `direction="probe"` their code fails.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out}; it is a share between 0 and 1")
    sites = pick_layers(model, layers, "z", default="all")
    total = len(sites) * model.n_heads
    count = max(1, round(total / 20)) if n_elements is None else n_elements
    if not 0 < count <= total:
        raise ValueError(f"n_elements={count}, but there are {total} heads in layers {[site.layer for site in sites]}")
    states = contrast_states(model, data, sites)
    accuracy = torch.stack([head_accuracy(*states[site], held_out=held_out, seed=seed) for site in sites])
    best = accuracy.flatten().argsort(descending=True, stable=True)[:count].tolist()
    chosen = [divmod(index, model.n_heads) for index in best]
    loops = []
    for row in sorted({row for row, _ in chosen}):
        site = sites[row]
        picked = sorted(head for layer, head in chosen if layer == row)
        vector = head_shift(*states[site], picked, direction=direction, site=site)
        loops.append(Loop(Add(vector), site, where=where, strength=strength))
    found = {
        "heads": [[sites[row].layer, head] for row, head in chosen],
        "accuracy": accuracy.flatten()[best].tolist(),
    }
    return Controller(loops, found)
