"""COLD-Steer with the learning dynamics themselves: what one gradient step would change in each activation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from steerlens.core import POINTS, Controller, Direction, Loop
from steerlens.core.progress import bar
from steerlens.core.types import Layers, Where
from steerlens.fit.card import Card
from steerlens.fit.contrast import Pairs
from steerlens.fit.method import method
from steerlens.fit.objectives import Labelled, Objective, Scale, labelled, objective
from steerlens.fit.reading import mean_norm, pick_layers
from steerlens.fit.retune import Draft, Retune, edited, ratio
from steerlens.hosts import Host
from steerlens.hosts.batches import pad
from steerlens.hosts.types import Model
from steerlens.laws.learning import Drift

#: Step of a central difference as a fraction of the parameters' norm: truncation and float32 rounding both stay
#: below 1e-2 of the tangent there.
RELATIVE_STEP = 3e-6


def _retune(draft: Draft) -> None:
    factor = ratio("eta", draft.changes["eta"], draft.before["eta"])
    draft.laws(lambda law, loop: edited(law, norm=law.norm * factor))
    draft.found["rates"] = [rate * factor for rate in draft.found["rates"]]


@method(
    card=Card(needs="completions", points=POINTS, derivatives="parameters", prompt_passes=2),
    # a gradient step depends on how a function is parametrised
    exceptions={"hooked": "a HookedTransformer's parameters are not the model's"},
    retune=Retune(("eta",), _retune),
)
def cold_fd(
    model: Model,
    data: Pairs,
    *,
    loss: str | Callable[[Tensor, Tensor], Tensor] = "dpo",
    beta: float = 0.1,
    reference: str | None = None,
    estimator: Literal["auto", "jvp", "fd"] = "auto",
    embedding: Literal["tied", "untied"] | None = "tied",
    eta: float = 0.1,
    scale: Scale = "relative",
    layers: Layers = None,
    point: str = "resid_post",
    strength: float = 1.0,
    where: Where = "prompt",
    batch: int = 4,
) -> Controller:
    """Move each activation as one step of gradient descent on a few examples would move it, to first order.

        u_t = -eta J_t g,   J_t = dx_t / dtheta,   g = (1/N) sum_i dL_i / dtheta

    The derivative of the unsteered activation of the very text that is being steered, at each of its tokens, along the
    parameters' gradient on the examples. Nothing is differentiated backwards while steering: every steered forward
    pass is accompanied by a second one, up to the last steered layer, that carries the tangent (while decoding, with
    its own KV cache). All layers take their control from that one unsteered pass. The losses are those of
    `cold_kernel`.

    Args:
        model: TransformerBridge or nnsight model whose weights are on this machine.
        data: `(prompt, completion)` tuples or chats that end with the assistant, as for `cold_kernel`.
        loss, beta, reference: As for `cold_kernel`.
        estimator: `"jvp"`: forward-mode differentiation, exact. `"fd"`: central differences of two passes with the
            parameters moved by 3e-6 of their norm to either side (the authors: a one-sided difference of absolute step
            1e-6, which float32 cannot resolve). `"auto"`: jvp, and fd if an operation of the model has no
            forward-mode derivative.
        embedding: `"tied"`: if the output embedding shares the matrix of the input embedding, g contains the gradient
            of both uses, as in the authors' code. `"untied"`: that of its use at the input only. None: the embedding
            is held fixed.
        eta: With `scale="relative"`: mean norm of u over mean norm of x, both at the token before each example's first
            label, no unit. With `"absolute"`: the learning rate, as in the paper. The error of the first order
            grows with it: on SmolLM2 20 % of the real step at a relative 0.05, 38 % at 0.1 (tutorial 03).
        scale: See `eta`. The recipe holds the learning rate of each layer.
        layers: Blocks, counted from 0; default the middle one. The paper's layer l is the output of block l - 1.
        point: Point of the block, see `Site`.
        strength: Factor on the control, no unit; it multiplies the learning rate.
        where: Token positions, see `Loop`. The paper changes the prompt and no generated token; its own code includes
            position 0, whose change is far larger than the others'. Positions beyond the prompt cost a second pass for
            each generated token.
        batch: Pairs in one forward and backward pass of the fit.

    Returns:
        One loop per layer; all share g, which has the size of the blocks up to the last of them and of the embedding:
        a server, which must trust the request, gets it only with a `payload_limit` of that size.
        Recorded signals: `u`, `u_norm`, `relative` (norm of u over norm of x before the loop's strength, no unit: the
        expansion holds while it is small).

    Raises:
        ValueError: a text without a prompt or without label tokens; a dpo pair with two different prompts; an unknown
            option; a layer or point the model does not have; a gradient that is zero or not finite.
        NotImplementedError: the weights are not on this machine, or the model is a HookedTransformer: a gradient step
            depends on how a function is parametrised, and its parameters are not the model's.

    Without a refit, by `controller.retuned`: `eta`.

    Source: COLD-Steer (arXiv 2603.06495). The authors take the difference at a second steered layer against a state
    that the first has already moved, and at decoding steps against a pass without context; here both are unsteered
    passes of the same tokens.
    """
    learner = model.learner()
    aim = objective(loss, beta=beta, reference=reference)
    sites = pick_layers(model, layers, point, default="middle")
    texts = labelled(data, model, aim.sides)
    direction, norm = learner.gradient(_losses(model, aim, texts, batch), max(site.layer for site in sites), embedding)
    differences = Direction(direction.names, direction.values, RELATIVE_STEP * learner.norm(direction.names))
    if scale == "absolute":
        texts = texts[:1]  # no more than shows whether the model can be differentiated
    tokens, weights = [text.tokens for text in texts], [text.weights() for text in texts]
    direction = differences if estimator == "fd" else direction
    try:
        moved = learner.tangents(tokens, weights, sites, direction)
    except NotImplementedError:
        if estimator != "auto":
            raise
        direction = differences
        moved = learner.tangents(tokens, weights, sites, direction)
    states = model.read(tokens, weights, sites) if scale == "relative" else {}
    loops, rates = [], []
    for site in sites:
        rate = eta if scale == "absolute" else eta * mean_norm(states[site]) / (norm * mean_norm(moved[site]))
        loops.append(Loop(Drift(torch.tensor(rate * norm)), site, where=where, strength=strength, tangent=direction))
        rates.append(rate)
    return Controller(loops, {"estimator": "fd" if direction.step else "jvp", "rates": rates})


def _losses(
    host: Host, aim: Objective, texts: list[Labelled], batch: int
) -> Iterator[Callable[[Callable[[Tensor, Tensor], Tensor]], Tensor]]:
    """The mean loss over the examples, in parts."""
    per = 2 if aim.sides == "both" else 1
    count = len(texts) // per
    for start in bar(range(0, len(texts), batch * per), desc="gradients"):
        chosen = texts[start : start + batch * per]
        ids, mask, _ = pad([text.tokens for text in chosen], [text.weights() for text in chosen], host.device)

        def loss(
            logits: Callable[[Tensor, Tensor], Tensor],
            ids: Tensor = ids,
            mask: Tensor = mask,
            chosen: list[Labelled] = chosen,
        ) -> Tensor:
            return aim(logits(ids, mask), chosen).sum() / count

        yield loss
