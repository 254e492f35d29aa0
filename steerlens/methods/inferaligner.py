"""InferAligner: guidance from an aligned model, given only to the prompts that need it."""

from __future__ import annotations

from steerlens.core import POINTS, Controller, Loop, Site
from steerlens.core.types import Layers, Where
from steerlens.fit.card import Card
from steerlens.fit.contrast import Pairs
from steerlens.fit.method import method
from steerlens.fit.reading import contrast_means, every_layer, unit
from steerlens.gating import gate
from steerlens.hosts import host_of
from steerlens.hosts.types import Model
from steerlens.laws.feedback import Add


@method(card=Card(needs="sets", points=POINTS, also="ideally also an aligned model"), paper={"strength": 4.0})
def inferaligner(
    model: Model,
    data: Pairs,
    *,
    aligned: Model | None = None,
    condition: Pairs | None = None,
    layers: Layers = None,
    gate_layers: Layers = None,
    point: str = "resid_post",
    strength: float = 0.13,
    where: Where = "all",
    paper: bool = False,
) -> Controller:
    """Add an aligned model's contrast vector, but only to prompts that the model itself classifies as positive.

        u = g s theta,   theta = mean_i y(p_i+) - mean_i y(p_i-),   y the aligned model's activation
        g = 1 if <x, d> > b, else 0,   d = (mean_i x(p_i+) - mean_i x(p_i-)) / |.|,   b half way between the means

    x is the unsteered state of the prompt's last token in the model that is steered, y the aligned model's at the
    tokens that `Pairs.read` selects. Without an aligned model this is a gated `caa`. The decision is made once for each
    row of the batch and kept while tokens are generated; one gate serves all layers.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model.
        data: Positive prompts, for which guidance is wanted (in the paper: harmful), and negative ones (harmless).
        aligned: The model from which theta is read, of the same family and size, so that the bases of its residual
            stream correspond; default: the model itself.
        condition: Other prompts to fit the gate on; default those of `data`.
        layers: Where theta is added; default the middle third.
        gate_layers: Layers to choose from for the gate; the one that separates the prompts best is taken. Default: all
            before the first of `layers`. A later layer costs a second pass over each prompt.
        point: Point of the block, see `Site`.
        strength: s, in multiples of the aligned model's class difference, which is added at each of `layers`. The
            default has a KL of about 0.3 nats per token on SmolLM2 if the gate is open, 4 (the paper) one of 10.
        where: Token positions, see `Loop`. The paper adds to every token.
        paper: Take the paper's strength, if none is given.

    Returns:
        One loop per layer. Recorded signals: `u`, `u_norm`, `gate` (0 or 1), `score` (distance of the prompt to the
        gate's boundary, in activation units).

    Raises:
        ValueError: an aligned model of other width or depth; a layer or point the model does not have; sides with
            identical activations at a layer.

    Source: Wang et al. (arXiv 2401.11206). No code was released: the gate's boundary, half way between the means, and
    the layers are our choice.
    """
    guide = model if aligned is None else host_of(aligned)
    if (guide.n_layers, guide.d_model) != (model.n_layers, model.d_model):
        raise ValueError(
            f"the aligned model has {guide.n_layers} layers of width {guide.d_model}, the model {model.n_layers} of "
            f"{model.d_model}; their residual streams do not correspond"
        )
    depth = model.n_layers
    third = list(range(depth // 3, -(-2 * depth // 3)))
    sites = [Site(layer, point) for layer in every_layer(model, third if layers is None else layers)]
    model.check(sites)
    before = list(range(sites[0].layer)) or [0]
    opened = gate(
        model,
        data if condition is None else condition,
        gate_layers=before if gate_layers is None else gate_layers,
        point=point,
        pool="last",
    )
    positive, negative = contrast_means(guide, data, sites)
    loops = []
    for site in sites:
        theta = positive[site] - negative[site]
        unit(theta, site)  # raises for a zero difference
        loops.append(Loop(Add(theta), site, where=where, strength=strength, gates=(opened,)))
    found = {
        "gate_layer": opened.summaries[0].site.layer,
        "aligned": None if aligned is None else guide.fingerprint(),
    }
    return Controller(loops, found)
