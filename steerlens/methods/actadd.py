"""Activation addition from pairs of prompts."""

from __future__ import annotations

from einops import reduce

from steerlens.core import POINTS, Controller, Loop
from steerlens.core.types import Layers
from steerlens.fit.card import Card
from steerlens.fit.contrast import Pairs, tokenize
from steerlens.fit.method import method
from steerlens.fit.reading import check_finite, pick_layers
from steerlens.hosts import Host
from steerlens.hosts.types import Model
from steerlens.laws.feedback import Add


@method(card=Card(needs="pairs", points=POINTS))
def actadd(
    model: Model,
    data: Pairs,
    *,
    layers: Layers = None,
    point: str = "resid_pre",
    strength: float = 1.0,
) -> Controller:
    """Add the activations of one prompt minus those of another, position by position, at the start of every prompt.

        u_t = s (x_t(p+) - x_t(p-)),   t = 0 ... max(len p+, len p-) - 1

    The shorter prompt is padded on the right with the token of a space, as the authors do. Each position has a loop of
    its own, because the differences are aligned with the start of the prompt. Position 0 is included; if both prompts
    start with BOS, their difference is zero there.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model.
        data: One positive and one negative text; the differences of several pairs are averaged.
        layers: Where to add; default the layer at a fifth of the depth (6 to 10 of 48 in the paper).
        point: Point of the block, see `Site`; the paper adds before the block.
        strength: s, no unit; 1 to 15 in the paper.

    Returns:
        One loop per layer and position. Recorded signals: `u`, `u_norm`.

    Raises:
        ValueError: a layer or point the model does not have; the two sides have different numbers of texts; an
            activation that is not finite.

    Source: Turner et al. (arXiv 2308.10248).
    """
    sites = pick_layers(model, layers, point, default="fifth")
    space = _space(model)
    texts = [tokenize(text, model, data.prepend_bos)[0] for side in (data.positive, data.negative) for text in side]
    length = max(map(len, texts))
    # a row of the batch for each position to read: the texts are a few tokens long
    tokens = [text + space * (length - len(text)) for text in texts for _ in range(length)]
    weights = [[float(t == position) for t in range(length)] for _ in texts for position in range(length)]
    read = model.read(tokens, weights, sites)
    loops = []
    for site in sites:
        check_finite(read[site], site, model)
        positive, negative = reduce(read[site], "(side pair pos) ... -> side pos ...", "mean", side=2, pos=length)
        for position, vector in enumerate(positive - negative):
            where = slice(position, position + 1)
            loops.append(Loop(Add(vector), site, where=where, strength=strength))
    return Controller(loops)


def _space(host: Host) -> list[int]:
    """The token that pads the shorter prompt; a tokenizer without one for a space gives its end-of-text token."""
    if host.tokenizer is None:
        return [0]
    return tokenize(" ", host, prepend_bos=False)[0][-1:] or [host.tokenizer.eos_token_id or 0]
