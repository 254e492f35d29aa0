"""Threshold-based dynamic activation: neurons that the prompt did not use stay off while it is continued."""

from __future__ import annotations

import torch
from torch import Tensor

from steerlens.core import Controller, Loop, Site, Summary
from steerlens.core.types import Layers, Where
from steerlens.fit.card import Card
from steerlens.fit.contrast import Pairs
from steerlens.fit.method import method
from steerlens.fit.reading import contrast_states, every_layer
from steerlens.hosts.types import Model
from steerlens.laws.scaling import Dynamic


@method(
    card=Card(needs="sets", points=("mlp_post",), derivatives="weights"),
    paper={"error": 0.2},
    exceptions={
        # it acts on generated tokens only, and these checks look at a prompt
        "check_fits_with_defaults": "the controller changes nothing",
        "check_record_is_what_was_added": "no control was recorded",
        # a threshold has no derivative
        "check_gradients_flow": "no gradient reaches the controller's tensors",
    },
)
def tda(
    model: Model,
    data: Pairs,
    *,
    error: float = 0.03,
    layers: Layers = None,
    strength: float = 1.0,
    where: Where = "generated",
    paper: bool = False,
) -> Controller:
    """Switch off the neurons that a prompt hardly used while it is continued.

        u = s (m - 1) * a,   m_n = 1 if |w_n| rms_t(a_tn) > b, else 0
        b: largest with mean_i |sum_n [|w_n a_in| < b] a_in w_n| / |sum_n a_in w_n| <= error

    a is the neurons' activation `mlp_post`, w_n what neuron n writes, rms over the unsteered prompt's tokens. The
    neurons are chosen once for each row of the batch. An intervention that shows how few neurons a continuation needs;
    it saves no time here, since the matrices are multiplied whole.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model whose weights are on this machine.
        data: Texts of both sides calibrate the threshold; `Pairs.read` selects the token whose activation is a_i.
        error: Share of the MLP's output that the dropped neurons may carry on these texts, no unit. The default has a
            KL of about 0.3 nats per token on SmolLM2, 0.2 (the paper) one of 2.
        layers: Default all.
        strength: s; 1 switches off.
        where: Token positions, see `Loop`; default the generated tokens as they are read, so that the first of them is
            still produced with all neurons.
        paper: Take the paper's share, if none is given.

    Returns:
        One loop per layer. The recipe holds each layer's threshold and the share of neurons below it on the texts.
        Recorded signals: `u`, `u_norm`, `kept` (share of the neurons that stay on, no unit).

    Raises:
        ValueError: an `error` outside (0, 1); a layer the model does not have.
        NotImplementedError: the model's weights are not on this machine.

    Source: Ma et al. (arXiv 2408.11393). No code was released. The paper's root of the sum over the prompt is a root
    mean square here, so that a threshold fitted on single tokens means the same for prompts of any length.
    """
    if not 0 < error < 1:
        raise ValueError(f"error={error}; it is a share of the MLP's output, between 0 and 1")
    sites = [Site(layer, "mlp_post") for layer in every_layer(model, layers)]
    model.check(sites)
    loops, bounds, shares = [], [], []
    for site, sides in contrast_states(model, data, sites).items():
        a = torch.cat(sides)
        writes = model.neuron_writes(site.layer).to(a)
        norms = torch.linalg.vector_norm(writes, dim=-1)
        bound = tail_threshold(a, writes, error)
        law = Dynamic(norms, torch.tensor(bound, dtype=a.dtype))
        summary = Summary(site, pool="rms")
        loops.append(Loop(law, site, where=where, strength=strength, summary=summary))
        bounds.append(bound)
        shares.append(float((norms * a.abs() < bound).double().mean()))
    return Controller(loops, {"thresholds": bounds, "below": shares})


def tail_threshold(activations: Tensor, writes: Tensor, error: float) -> float:
    """Largest threshold below which neurons carry at most `error` of the output, `[text neuron], [neuron d]`.

    By bisection, to 1e-4 of the largest contribution; neurons may cancel, so that the share need not grow evenly.
    """
    a, w = activations.double(), writes.double()
    sizes = a.abs() * torch.linalg.vector_norm(w, dim=-1)
    whole = torch.linalg.vector_norm(a @ w, dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
    low, high = 0.0, float(sizes.max())
    if not high:
        return 0.0
    for _ in range(40):
        middle = (low + high) / 2
        tail = torch.linalg.vector_norm(torch.where(sizes < middle, a, 0.0) @ w, dim=-1)
        low, high = (middle, high) if float((tail / whole).mean()) <= error else (low, middle)
        if high - low <= 1e-4 * float(sizes.max()):
            break
    return low
