"""COLD-Steer with a kernel instead of the learning dynamics: one gradient step, taken on the activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from steerlens.core import POINTS, Controller, Law, Loop, Now, Site
from steerlens.core.types import Layers, Where
from steerlens.fit.card import Card
from steerlens.fit.contrast import Pairs
from steerlens.fit.gradients import example_gradients
from steerlens.fit.method import method
from steerlens.fit.objectives import Scale, objective
from steerlens.fit.reading import mean_norm, pick_layers
from steerlens.fit.retune import Draft, Retune
from steerlens.hosts.types import Model
from steerlens.laws.feedback import Add
from steerlens.laws.learning import Kernel


def _retune(draft: Draft) -> None:
    factor = draft.scale("eta")
    draft.found["rates"] = [rate * factor for rate in draft.found["rates"]]


@method(
    card=Card(needs="completions", points=POINTS, derivatives="activations"),
    retune=Retune(("eta",), _retune),
)
def cold_kernel(
    model: Model,
    data: Pairs,
    *,
    loss: str | Callable[[Tensor, Tensor], Tensor] = "dpo",
    beta: float = 0.1,
    reference: str | None = None,
    pairs: Literal["sum", "rejected_only"] = "sum",
    kernel: Literal["unit", "linear"] = "unit",
    eta: float = 0.1,
    scale: Scale = "relative",
    layers: Layers = None,
    point: str = "resid_post",
    strength: float = 1.0,
    where: Where = "prompt",
    batch: int = 4,
) -> Controller:
    """Move the activations as one step of gradient descent on a few examples would, with a kernel for the parameters.

        u = -eta v,   v = (1/N) sum_i g_i,   g_i = dL_i / dx_i,   x_i the activation before text i's first label token
        u = -eta (1/N) sum_i <x, x_i> g_i                         for kernel="linear"

    A step on the parameters moves the activation of a new input by `-eta J(x) (1/N) sum_i J(x_i)' g_i`; the unit kernel
    replaces `J(x) J(x_i)'` by the identity. The labels are the tokens after the common prefix of the prompt and the
    whole text; `l` is the mean log probability of a text's labels:

        sft           L = -l+          negative_sft   L = l-
        dpo           L = -log sigmoid(beta (l+ - l-)),   reference="self": beta ((l+ - l+ref) - (l- - l-ref))

    A dpo gradient is the sum of those of both runs, each at its own position.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model whose weights are on this machine.
        data: `(prompt, completion)` tuples or chats that end with the assistant. For dpo both texts of a pair have the
            same prompt; sft reads the positive texts only, negative_sft the negative ones.
        loss: One of the names above, or a function of the mean label log probabilities `l+`, `l-` (both `[pair]`) that
            gives a loss for each pair, `[pair]`.
        beta: Of dpo, no unit.
        reference: None, as the paper has it (no reference model), or `"self"`: the model itself, held fixed, which
            gives every pair the weight beta / 2.
        pairs: `"sum"`, or `"rejected_only"` to reproduce the authors' dpo, which keeps the gradient of the
            rejected run only.
        kernel: `"unit"` or `"linear"`. The authors evaluate their linear kernel at the last prompt token and add the
            result to every token; here each token has its own.
        eta: With `scale="relative"`: mean norm of u over mean norm of x, both at the fitting positions, no unit. With
            `"absolute"`: the learning rate (paper: 0.1 to 2), which is not transferable between models.
        scale: See `eta`. The recipe holds the learning rate of each layer.
        layers: Blocks, counted from 0; default the middle one. The paper's layer l is the output of block l - 1.
        point: Point of the block, see `Site`.
        strength: Factor on the control, no unit; it multiplies the learning rate.
        where: Token positions, see `Loop`. The paper changes the prompt and no generated token; its own code includes
            position 0, whose change is far larger than the others'.
        batch: Pairs in one forward and backward pass.

    Returns:
        One loop per layer. Recorded signals: `u`, `u_norm`.

    Raises:
        ValueError: a text without a prompt or without label tokens; a dpo pair with two different prompts; an unknown
            option; a layer or point the model does not have; a gradient that is zero or not finite.
        NotImplementedError: the model's weights are not on this machine.

    Without a refit, by `controller.retuned`: `eta`.

    Source: COLD-Steer (arXiv 2603.06495). The authors' released code overwrites the chosen run's dpo gradient with the
    rejected run's (see `pairs`) and reads it at a position of the wrong sequence if their lengths differ.
    """
    aim = objective(loss, beta=beta, reference=reference)
    if pairs == "rejected_only" and aim.sides != "both":
        raise ValueError(f"pairs='rejected_only' reproduces a defect of dpo; loss={loss!r} has no rejected run to keep")
    sites = pick_layers(model, layers, point, default="middle")
    states, gradients, count = example_gradients(
        model, data, aim, sites, rejected_only=pairs == "rejected_only", batch=batch
    )
    loops, rates = [], []
    for site in sites:
        x, g = states[site], gradients[site]
        law: Law = Add(-(g.sum(0) / count)) if kernel == "unit" else Kernel(x, g, count)
        rate = eta if scale == "absolute" else eta * mean_norm(x) / _moved(law, x, site)
        loops.append(Loop(law, site, where=where, strength=strength * rate))
        rates.append(rate)
    return Controller(loops, {"rates": rates})


def _moved(law: Law, x: Tensor, site: Site) -> float:
    """Mean norm of the control at the fitting states."""
    moved = mean_norm(law.act(x[:, None], Now())[0][:, 0])
    if moved == 0:
        raise ValueError(f"the loss has no gradient at {site}; do its labels depend on what comes before them?")
    return moved
