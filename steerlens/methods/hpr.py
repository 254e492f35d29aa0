"""Householder pseudo-rotation: turn states on the wrong side of a hyperplane, by a learned angle."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from steerlens.core import Controller, Loop, Site, map_tensors
from steerlens.core.law import finite
from steerlens.core.progress import bar
from steerlens.core.types import Layers, Where
from steerlens.fit.card import Card
from steerlens.fit.contrast import Pairs
from steerlens.fit.logistic import linear_probe
from steerlens.fit.method import method
from steerlens.fit.reading import contrast_states, every_layer
from steerlens.fit.retune import Draft, Retune, edited
from steerlens.flow.flows import angle
from steerlens.hosts.types import Model
from steerlens.laws.rotation import PseudoRotation, predict_angle


def _retune(draft: Draft) -> None:
    alpha = finite("alpha", draft.changes["alpha"])
    draft.laws(lambda law, loop: edited(law, alpha=alpha))


@method(card=Card(needs="pairs", points=("resid_post",)), paper={"alpha": 1.0}, retune=Retune(("alpha",), _retune))
def hpr(
    model: Model,
    data: Pairs,
    *,
    layers: Layers = None,
    n_layers: int = 5,
    alpha: float = 0.8,
    steps: int = 200,
    rate: float = 5e-4,
    batch: int = 16,
    held_out: float = 0.2,
    seed: int = 0,
    strength: float = 1.0,
    where: Where = "last",
    paper: bool = False,
) -> Controller:
    """Rotate states that a probe classifies as negative towards and across its hyperplane, by an angle from a network.

        u = |x| (cos(g) x/|x| + sin(g) t) - x   if <w, x> <= 0, else 0
        g = alpha pi sigmoid(f(x)),   t = unit part of w orthogonal to x

    so that |x| is unchanged. The probe w is a logistic regression without intercept, f a network `d -> d/2 -> d/4 ->
    d/8 -> 1` with GELU, trained so that g is the angle between a negative state and its positive partner, and 0 at
    positive states. The authors write the rotation with the mirror image of x behind the hyperplane, divided by the
    sine of the angle between the two, which vanishes at the hyperplane; this is the same rotation without that
    division.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model.
        data: Contrast pairs; `Pairs.read` selects the token whose activation is x.
        layers: Layers to choose from; default all.
        n_layers: How many are steered: those of highest probe accuracy on held-out pairs, at most all. 5 in the paper.
        alpha: Factor on the angle, no unit. A large g rotates beyond the mirror image, as in the paper, whose factor is
            1; the default has a KL of about 0.3 nats per token on SmolLM2.
        steps: Steps of AdamW for each network.
        rate: Learning rate, after a warm-up over a twentieth of the steps.
        batch: Pairs in a step.
        held_out: Share of the pairs on which the probes are compared, one pair at least. The final probe and
            network are fitted on all pairs.
        seed: Of the held-out pairs, the networks' first weights and the batches.
        strength: Factor on the control, no unit; only 1 keeps the norm.
        where: Token positions, see `Loop`.
        paper: Take the paper's factor on the angle, if none is given.

    Returns:
        One loop per chosen layer, at `resid_post`. The recipe holds the accuracies and, per layer, the networks' root
        mean square error in radians. Recorded signals: `gate` `[batch pos]`, 1 if the state is rotated, else 0;
        `angle_rad` `[batch pos]`, the angle of the rotation, in radians; `u`; `u_norm`.

    Raises:
        ValueError: a layer the model does not have; fewer than two pairs; a number of layers, of steps or of pairs in a
            step below 1; pairs that do not differ; activations that are not finite.

    Without a refit, by `controller.retuned`: `alpha`.

    Source: Pham and Nguyen, Householder Pseudo-Rotation (EMNLP 2024, arXiv 2409.10053). Deviations: the authors train
    probe and network by one loss, whose two terms share no parameter; here the probe is the optimum of its own. They
    read every token of two responses, here `Pairs.read` gives one state for each text. The network's input is divided
    by a layer's root mean square activation, within its first weights.
    """
    check_training(n_layers=n_layers, steps=steps, batch=batch, alpha=alpha, rate=rate, held_out=held_out)
    if len(data) < 2:
        raise ValueError(f"hpr needs two pairs, one of them to compare layers on; there is {len(data)}")
    sites = [Site(layer, "resid_post") for layer in every_layer(model, layers)]
    model.check(sites)
    states = contrast_states(model, data, sites)
    scores = {site: probe_score(*states[site], held_out=held_out, seed=seed) for site in sites}
    # stable: layers that score the same go by depth
    chosen = sorted(sorted(sites, key=lambda site: scores[site], reverse=True)[:n_layers])
    loops, errors = [], []
    for site in bar(chosen, desc="training rotations"):
        positive, negative = states[site]
        if torch.equal(positive, negative):
            raise ValueError(f"both sides have identical activations at {site}; do all texts end in the same token?")
        probe = fit_probe(positive, negative)
        weights, biases, error = fit_angle(positive, negative, steps=steps, rate=rate, batch=batch, seed=seed)
        law = map_tensors(PseudoRotation(probe, weights, biases, alpha), lambda t, like=positive: t.to(like.dtype))
        loops.append(Loop(law, site, where=where, strength=strength))
        errors.append(error)
    found = {
        "layers": [site.layer for site in chosen],
        "accuracy": [scores[site][0] for site in chosen],
        "angle_error_rad": errors,
    }
    return Controller(loops, found)


def fit_probe(positive: Tensor, negative: Tensor) -> Tensor:
    """Weights `[d]` of a logistic regression without intercept; sides `[n d]`."""
    # in units of the states' own size, so that the regularisation is the same at every layer
    x = torch.cat([positive, negative]).double()
    labels = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))])
    return linear_probe(x / x.square().mean().sqrt(), labels, intercept=False)[0]


def probe_score(positive: Tensor, negative: Tensor, *, held_out: float, seed: int) -> tuple[float, float]:
    """Accuracy of a probe on held-out pairs, and for ties the mean cosine by which it is right; sides `[n d]`."""
    order = torch.randperm(len(positive), generator=torch.Generator().manual_seed(seed))
    size = min(max(1, round(held_out * len(order))), len(order) - 1)
    test, train = order[:size], order[size:]
    if torch.equal(positive[train], negative[train]):
        return 0.0, 0.0
    probe = fit_probe(positive[train], negative[train])
    sides = torch.cat([positive[test], -negative[test]]).double()
    cosine = torch.nn.functional.cosine_similarity(sides, probe[None])
    return float((cosine > 0).double().mean()), round(float(cosine.mean()), 4)


def fit_angle(
    positive: Tensor,
    negative: Tensor,
    *,
    steps: int = 200,
    rate: float = 5e-4,
    batch: int = 16,
    seed: int = 0,
) -> tuple[list[Tensor], list[Tensor], float]:
    """Train a network from a state to the angle by which its positive partner lies away; sides `[n d]`.

    Returns:
        Weights and biases, float64, and the root mean square error over all states, in radians.
    """
    generator = torch.Generator().manual_seed(seed)
    positive, negative = positive.double(), negative.double()
    scale = torch.cat([positive, negative]).square().mean().sqrt()
    positive, negative = positive / scale, negative / scale
    target = angle(negative, positive)
    widths = [positive.shape[1] // divisor or 1 for divisor in (1, 2, 4, 8)] + [1]
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    for inputs, outputs in pairwise(widths):
        bound = inputs**-0.5
        for size, kept in (((outputs, inputs), weights), ((outputs,), biases)):
            drawn = torch.rand(size, generator=generator, dtype=torch.float64)
            kept.append((bound * (2 * drawn - 1)).requires_grad_())

    def loss(rows: Tensor) -> Tensor:
        wrong = predict_angle(negative[rows], weights, biases) - target[rows]
        return (wrong.square().mean() + predict_angle(positive[rows], weights, biases).square().mean()) / 2

    warm_up = max(1, round(steps / 20))
    with torch.inference_mode(False), torch.enable_grad():
        optimiser = torch.optim.AdamW([*weights, *biases], lr=rate, weight_decay=0.0)
        rows = torch.empty(0, dtype=torch.long)
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / warm_up)
            if not len(rows):
                rows = torch.randperm(len(positive), generator=generator)
            optimiser.zero_grad()
            loss(rows[:batch]).backward()
            optimiser.step()
            rows = rows[batch:]
    weights, biases = ([part.detach() for part in side] for side in (weights, biases))
    error = float(loss(torch.arange(len(positive))).sqrt())
    return [weights[0] / scale, *weights[1:]], biases, error


def check_training(*, n_layers: int, steps: int, batch: int, alpha: float, rate: float, held_out: float) -> None:
    """Raises ValueError for what cannot be trained."""
    if n_layers < 1 or batch < 1:
        raise ValueError(f"n_layers={n_layers}, batch={batch}; one layer and one pair in a step are the least")
    if steps < 1:
        raise ValueError(f"steps={steps}: an angle network that was never trained rotates every state by a right angle")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha={alpha}; it must be finite")
    if not 0 < rate < math.inf:
        raise ValueError(f"rate={rate}; a learning rate is positive and finite")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out}; it is a share between 0 and 1")
