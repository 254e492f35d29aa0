"""PID steering: steering vectors computed by a PID controller whose error is the class difference at each layer."""

from __future__ import annotations

from torch import Tensor

from steerlens.core import Controller, Loop
from steerlens.core.types import Layers, Where
from steerlens.fit.card import VECTORS, Card
from steerlens.fit.contrast import Pairs
from steerlens.fit.method import method
from steerlens.fit.reading import check_gains, check_vectors, contrast_means, pick_layers, unit
from steerlens.fit.steered import steered_states
from steerlens.hosts.types import Model
from steerlens.laws.feedback import Add


@method(card=Card(needs="sets", points=VECTORS))
def pid_steering(
    model: Model,
    data: Pairs,
    *,
    kp: float = 0.3,
    ki: float = 0.01,
    kd: float = 0.01,
    sequential: bool = True,
    layers: Layers = None,
    point: str = "resid_post",
    strength: float = 1.0,
    where: Where = "last",
) -> Controller:
    """Add steering vectors that a PID controller has computed on the contrast texts, layer by layer.

        u_t = s (kp r_t + ki sum_{j<t} r_j + kd (r_t - r_{t-1})),   r_t = mean x_t(p+) - mean x_t(p-)

    The feedback is in the fit: the negative texts are read while the layers before t are steered with the vectors that
    were already computed, so that r_t is what is left of the class difference there. The control itself is open loop: a
    constant vector at each layer, the same for every token. `pid` is another controller (S-PID): it measures each
    token's own error while the text is generated.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model.
        data: Contrast texts; `Pairs.read` selects the token whose activation is x.
        kp, ki, kd: Gains, no unit; kp alone is Mean-AcT, as a share of the way. The first layer has no derivative.
        sequential: Compute r_t under the control of the earlier layers, which takes a forward pass over the negative
            texts for each layer. False: on unsteered activations, read once.
        layers: Where to act; default all. Sums and differences go over these layers.
        point: Point of the block, see `Site`.
        strength: s, no unit: 0 is off. The vectors are computed for 1.
        where: Token positions, see `Loop`. While the texts are read, every token but that at position 0 is steered.

    Returns:
        One loop per layer, from the first at which the texts differ. The recipe holds |r_t|, `remaining`, in activation
        units. Recorded signals: `u` `[batch pos d]`, `u_norm`.

    Raises:
        ValueError: a gain that is not finite, all three 0; a layer or point the model does not have; sides with
            identical activations at every layer; with `sequential`, a model that is being steered.

    Source: Nguyen et al., Activation Steering with a Feedback Controller (arXiv 2510.04309), the variant whose vectors
    are added. The formula is that of summaries of the paper, whose text could not be read. Not reproduced: the authors'
    gains for each model and task; a public copy of
    their code has kp = 0.3, an integral that is the mean over the earlier layers times 1.5e-4, and no derivative; the
    variants that ablate or rotate with the computed vectors.
    """
    check_gains(kp, ki, kd)
    check_vectors("pid_steering", point)
    sites = pick_layers(model, layers, point, default="all")
    positive, negative = contrast_means(model, data, sites)
    differ = [site for site in sites if bool((positive[site] - negative[site]).any())]
    if not differ:
        unit(positive[sites[0]] - negative[sites[0]], sites[0])
    texts = data.sides(model)[1]
    total: Tensor | None = None
    before: Tensor | None = None
    loops: list[Loop] = []
    acting: list[Loop] = []
    remaining = []
    for site in differ:
        here = negative[site].double()
        if sequential and acting:
            here = steered_states(model, texts, acting, site).mean(0)
        r = positive[site].double() - here
        u = kp * r
        if total is not None and before is not None:
            u = u + ki * total + kd * (r - before)
        total, before = r if total is None else total + r, r
        remaining.append(float(r.norm()))
        law = Add(u.to(positive[site].dtype))
        acting.append(Loop(law, site, where="all"))
        loops.append(Loop(law, site, where=where, strength=strength))
    return Controller(loops, {"remaining": remaining})
