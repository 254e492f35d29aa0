"""A vector trained through the model, the strong baseline of fitted directions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from torch import Tensor

from steerlens.core import Controller, Loop
from steerlens.core.types import Layers, Where
from steerlens.fit.card import VECTORS, Card
from steerlens.fit.contrast import Pairs
from steerlens.fit.method import method
from steerlens.fit.objectives import Preference, labelled, objective
from steerlens.fit.reading import check_finite, check_vectors, mean_norm, pick_layers
from steerlens.fit.training import Training
from steerlens.hosts.types import Model
from steerlens.laws.feedback import Add


@method(card=Card(needs="completions", points=VECTORS, derivatives="vectors"))
def trained_vector(
    model: Model,
    data: Pairs,
    *,
    loss: Literal["dpo", "sft", "negative_sft", "preference"] | Callable[[Tensor, Tensor], Tensor] = "dpo",
    beta: float = 1.0,
    length: float = 0.1,
    steps: int = 60,
    rate: float = 0.1,
    held_out: float = 0.25,
    seed: int = 0,
    batch: int = 8,
    layers: Layers = None,
    point: str = "resid_post",
    strength: float = 1.0,
    where: Where = "last",
) -> Controller:
    """Add a vector that gradient descent has found: the one of its length with which the completions are likeliest.

        u = s v,   v = n w / |w|,   w <- Adam(d/dw mean_i L(l_i+, l_i-)),   n = length mean |x|

        dpo   L = -log sigmoid(beta (l+ - l-))      sft   L = -l+      negative_sft   L = l-
        preference   L = -log sigmoid(b+ l+(v) - l-(v)) - log sigmoid(b- l-(-v) - l+(-v))
                     b+ = max(L-(0) - L+(0), 1),   b- = max(L+(0) - L-(0), 1)

    with l+ and l- the mean log probabilities of the labels while v is added to every token from the last one of the
    prompt on, and L+(0) and L-(0) their sums without it. Only the direction is trained; its norm is fixed, so that a
    loss cannot be lowered by pushing without end. Training starts at the direction in which the loss falls fastest, and
    ends when the loss on pairs that are held out has not fallen for twenty steps; the vector with the least one is
    kept. Several layers are trained together.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model whose weights are on this machine.
        data: `(prompt, completion)` tuples or chats that end with the assistant, as for `cold_kernel`; two pairs at
            least, a dozen or more if the held-out loss is to mean something.
        loss: One of the names above, or a function of l+ and l- (both `[pair]`) that gives a loss for each pair.
        beta: Of dpo, no unit.
        length: |v| as a share of the mean |x| at the last prompt tokens, no unit; that for which training is done. The
            default has a KL of .31 nats per token on SmolLM2 (sentiment), twice as much one of .86.
        steps, rate, batch: Most steps of Adam, its rate for w of norm 1, and pairs in one step.
        held_out: Share of the pairs that only end the training and choose the step.
        seed: Of the choice of the held-out pairs and of the batches.
        layers: Blocks, counted from 0; default the middle one.
        point: Point of the block, see `Site`.
        strength: s, no unit: 0 is off, 1 what was trained.
        where: Token positions, see `Loop`.

    Returns:
        One loop per layer. The recipe holds `step`, the step that was kept, and the held-out loss `before` and `after`.
        Recorded signals: `u` `[batch pos d]`, `u_norm`.

    Raises:
        ValueError: a text without a prompt or without label tokens; a dpo pair with two different prompts; fewer than
            two pairs; a length, rate or share that is no positive number; a layer or point the model does not have; a
            loss without a gradient; activations that are not finite; a model that is being steered.
        NotImplementedError: the model's weights are not on this machine.

    Source: BiPO (Cao et al., arXiv 2406.00045) trains a vector by dpo, in both signs; RePS (Wu et al., arXiv
    2505.20809) compares likelihood, dpo and its own reference-free preference loss for vectors of rank one.
    Differences: a fixed norm, early stopping; dpo trains one sign; preference (RePS) suppresses with -v, as BiPO does,
    and not by a projection. Not reproduced: training with several strengths.
    """
    for name, value in (("length", length), ("rate", rate), ("held_out", held_out), ("steps", steps), ("batch", batch)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}={value!r}; it must be a positive number")
    if held_out >= 1:
        raise ValueError(f"held_out={held_out!r}; it is a share of the pairs, less than 1")
    check_vectors("trained_vector", point)
    sites = pick_layers(model, layers, point, default="middle")
    aim = Preference() if loss == "preference" else objective(loss, beta=beta, reference=None, others=["preference"])
    texts = labelled(data, model, aim.sides)
    if len(texts) < (4 if aim.sides == "both" else 2):
        raise ValueError("trained_vector needs two pairs, one of them to stop by; there is 1")
    states = model.read([text.tokens for text in texts], [text.weights() for text in texts], sites)
    for site, values in states.items():
        check_finite(values, site, model)
    norms = [length * mean_norm(states[site]) for site in sites]
    found = Training(model, texts, aim, sites, norms, rate=rate, batch=batch).run(held_out, steps, seed)
    loops = [Loop(Add(v), site, where=where, strength=strength) for v, site in zip(found.vectors, sites, strict=True)]
    return Controller(loops, {"step": found.step, "before": found.before, "after": found.after})
