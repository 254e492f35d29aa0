"""What the features of a sparse autoencoder do on texts: which separate two sides, and where each is active."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from steerlens.core import Site
from steerlens.core.types import Autoencoder, Frame
from steerlens.fit.contrast import Pairs, Reading, Text, tokenize
from steerlens.fit.reading import check_finite, check_option
from steerlens.hosts import Host, host_of
from steerlens.hosts.types import Model
from steerlens.sae.slices import Origin, architecture, check_indices, site_of

#: What `rank_features` can rank by.
Ranking: TypeAlias = Literal["effect", "sparse", "output"]
NEURONPEDIA = "https://www.neuronpedia.org"


def states_of(host: Host, tokens: Sequence[Sequence[int]], site: Site) -> list[Tensor]:
    """The state of every token of texts at a site, `[pos d]` each.

    Raises:
        ValueError: no text, or an activation that is not finite.
    """
    if not tokens or not all(tokens):
        raise ValueError("no text to read; give at least one, of one token or more")
    found = host.states(tokens, [site])[site]
    for x in found:
        check_finite(x, site, host)
    return found


def rank_features(
    model: Model, sae: Autoencoder, pairs: Pairs, *, by: Ranking = "output", site: Site | str | None = None
) -> Frame:
    """Rank all features of an autoencoder by how they separate, or would move the model between, two sets of texts.

        effect = (mean a+ - mean a-) / sqrt((var a+ + var a-) / 2)
        score  = effect                                                        by="effect"
               = effect (1 - share of the texts of the other side where a > 0) by="sparse"
               = (mean a+ - mean a-) <d, g>                                    by="output"

    Cohen's d over texts, a the activation of each text, pooled over the tokens that `Pairs.read` selects (without
    position 0 if there are others). Two texts a side at least; a feature that is constant on both sides has effect 0.
    A feature that is on in most texts of both sides may separate them well and steer badly: `"sparse"` ranks it lower.
    `"output"` is the first-order effect on the model's output of what the feature writes, d its decoder row and g the
    gradient, summed over the tokens, of the difference between the two sides' mean log probability per token. A feature
    with a positive `effect` and a positive `score` by output favours the positive texts if it is raised.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model. `"output"` takes gradients, for which the weights
            are on this machine or on a server that trusts you; the others need forward passes only.
        sae: Of sae-lens; it encodes here, TopK included.
        pairs: Contrast texts.
        by: What `score` is. At one KL the first feature by output was never worse than the others, and better for some
            concepts: `docs/sae.md`, `benchmarks/rank_features.py`.
        site: Where the autoencoder was trained, if its metadata does not say.

    Returns:
        A pandas DataFrame, one row a feature, the largest |score| first: `positive` and `negative`, mean activations,
        in units of the autoencoder; `effect`, no unit; `on_positive` and `on_negative`, the share of texts in which the
        feature is active at all; `score`, no unit, for `"output"` in nats per token.

    Raises:
        TypeError: `pairs` is not `Pairs`.
        ValueError: fewer than two texts a side, an unknown ranking, or the autoencoder does not fit the model.
        ImportError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("tables need pandas; pip install 'steerlens[plots]'") from error
    check_option("by", by, get_args(Ranking))
    if not isinstance(pairs, Pairs):
        raise TypeError(f"pairs is a {type(pairs).__name__}; give steerlens.Pairs(positive=[...], negative=[...])")
    if len(pairs) < 2:
        raise ValueError("an effect size needs at least two texts a side")
    architecture(sae)
    at, host = site_of(sae, site), host_of(model)
    Origin.of(sae).check(host, at)
    sides = pairs.sides(host)
    positive, negative = (_pooled(host, sae, side, at) for side in sides)
    difference = positive.mean(0) - negative.mean(0)
    spread = ((positive.var(0) + negative.var(0)) / 2).sqrt()
    # rounding of a constant activation is no spread
    effect = torch.where(spread > 1e-9, difference / spread.clamp(min=1e-9), 0.0)
    on_positive, on_negative = ((side > 0).double().mean(0) for side in (positive, negative))
    score = effect
    if by == "sparse":
        score = effect * (1 - torch.where(effect > 0, on_negative, on_positive))
    elif by == "output":
        gradient = _output_gradient(host, sides[0], at) - _output_gradient(host, sides[1], at)
        score = difference * (sae.W_dec.detach().cpu().double() @ gradient)
    columns = {
        "positive": positive.mean(0),
        "negative": negative.mean(0),
        "effect": effect,
        "on_positive": on_positive,
        "on_negative": on_negative,
        "score": score,
    }
    table = pandas.DataFrame({name: values.tolist() for name, values in columns.items()}).rename_axis("feature")
    return table.sort_values("score", key=lambda column: -column.abs(), kind="stable")


def _output_gradient(host: Host, side: Reading, site: Site, batch: int = 4) -> Tensor:
    """Of the mean log probability per token of some texts, along the same change of all their states, `[d]`."""
    total = torch.zeros(host.d_model, dtype=torch.float64)
    texts = [text for text in side.tokens if len(text) > 1]
    if not texts:
        raise ValueError("by='output' needs texts of two tokens or more; position 0 is left alone")
    for start in range(0, len(texts), batch):
        chosen = texts[start : start + batch]

        def loss(logits: Tensor, chosen: list[list[int]] = chosen) -> Tensor:
            each = []
            for row, text in zip(logits, chosen, strict=True):
                wanted = torch.tensor(text[1:], device=logits.device)
                each.append(row[: len(text) - 1].log_softmax(-1).gather(-1, wanted[:, None]).mean())
            return torch.stack(each).sum()

        # position 0 is left alone, as it is in steering
        weights = [[0.0] + [1.0] * (len(text) - 1) for text in chosen]
        total += host.gradients(chosen, weights, [site], loss)[site].double().sum(0)
    return total / len(texts)


@dataclass(frozen=True)
class Description:
    """What a feature does on some texts. From `describe`.

    Attributes:
        index: The feature.
        contexts: `(activation, before, token, after)` of the tokens with the highest activations, the highest first,
            one per text.
        density: Share of tokens on which it is active, without position 0.
        link: Its page on Neuronpedia, None if the autoencoder's metadata has no id.
    """

    index: int
    contexts: tuple[tuple[float, str, str, str], ...]
    density: float
    link: str | None

    def table(self) -> Frame:
        """One row a context, a pandas DataFrame."""
        import pandas

        return pandas.DataFrame(self.contexts, columns=["activation", "before", "token", "after"])

    def __repr__(self) -> str:
        lines = [f"  {value:7.2f}  {before}[{token}]{after}" for value, before, token, after in self.contexts]
        head = f"feature {self.index}, on at {self.density:.2%} of tokens" + (f", {self.link}" if self.link else "")
        return "\n".join([head, *lines])


def describe(
    model: Model,
    sae: Autoencoder,
    index: int,
    texts: Sequence[Text],
    *,
    top: int = 8,
    width: int = 8,
    site: Site | str | None = None,
) -> Description:
    """The contexts in which a feature is most active, how often it is active, and its page on Neuronpedia.

    Position 0 is left out: it carries an attention sink in many models. No network is used; the link is made from the
    metadata.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model.
        sae: Of sae-lens.
        index: The feature.
        texts: Strings, tuples, messages or token ids, as in `Pairs`.
        top: How many contexts, at most one per text.
        width: Tokens shown before and after.
        site: Where the autoencoder was trained, if its metadata does not say.

    Raises:
        IndexError: no such feature.
        ValueError: no text, or the autoencoder does not fit the model.
    """
    architecture(sae)
    (row,) = check_indices(sae, index)
    at, host = site_of(sae, site), host_of(model)
    Origin.of(sae).check(host, at)
    tokens = [tokenize(text, host)[0] for text in texts]
    found: list[tuple[float, str, str, str]] = []
    on = total = 0
    for ids, x in zip(tokens, states_of(host, tokens, at), strict=True):
        values = _encode(sae, x)[1:, row]
        on, total = on + int((values > 0).sum()), total + len(values)
        if len(values) and values.max() > 0:
            place = int(values.argmax()) + 1
            parts = ids[max(0, place - width) : place], [ids[place]], ids[place + 1 : place + 1 + width]
            before, token, after = (_words(host, part) for part in parts)
            found.append((float(values.max()), before, token, after))
    found.sort(key=lambda context: -context[0])
    return Description(row, tuple(found[:top]), on / max(total, 1), _link(sae, row))


def _link(sae: Autoencoder, row: int) -> str | None:
    name = getattr(sae.cfg.metadata, "neuronpedia_id", None)
    return f"{NEURONPEDIA}/{name}/{row}" if name else None


def _words(host: Host, ids: Sequence[int]) -> str:
    decode = getattr(host.tokenizer, "decode", None)
    return decode(list(ids)) if decode else " ".join(map(str, ids))


@torch.no_grad()
def _encode(sae: Autoencoder, x: Tensor) -> Tensor:
    """Activations of all features, `[pos d] -> [pos feature]`, float64 on the CPU."""
    return sae.encode(x.to(device=sae.W_enc.device, dtype=sae.W_enc.dtype)).double().cpu()


def _pooled(host: Host, sae: Autoencoder, side: Reading, site: Site) -> Tensor:
    """Each text's activations, pooled by its weights, `[text feature]`."""
    rows = []
    for weights, x in zip(side.weights, states_of(host, side.tokens, site), strict=True):
        share = torch.tensor(weights, dtype=torch.float64)
        if (share[1:] > 0).any():
            share[0] = 0.0
        rows.append((share / share.sum()) @ _encode(sae, x))
    return torch.stack(rows)
