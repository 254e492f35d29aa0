"""Scorers that well-kept packages bring, and the direction of a control; all are proxies but the last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from steerlens.evaluate.bench import Arm, Bench
from steerlens.evaluate.log import digest
from steerlens.evaluate.meter import Meter, Values, fixed
from steerlens.evaluate.written import scorer
from steerlens.fit.contrast import Pairs, Text

#: From texts to one vector each, `[text d]`, an array or a tensor.
Embed = Callable[[list[str]], Any]
#: What `concept` embeds with by default, a name that sentence-transformers knows.
EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"


def concept(
    examples: Pairs | Sequence[str],
    others: Sequence[str] | None = None,
    prompts: Sequence[Text] | None = None,
    *,
    embed: Embed | str = EMBEDDER,
    name: str = "concept",
    instruction: str = "",
) -> Meter:
    """How close a text is to examples of a concept, by the cosines of sentence embeddings; -2 to 2, a proxy.

        s = cos(e, mean_i e+_i) - cos(e, mean_i e-_i),   e the text's embedding

    Args:
        examples: Texts that show the concept; of `Pairs` the positive side, whose other side is `others`. Take pairs
            that no controller was fitted on.
        others: Texts that do not.
        prompts: What the model continues; None: the prompts of the evaluation.
        embed: `(texts) -> [text d]`, or the name or folder of a model of sentence-transformers.
        name: Of the column.
        instruction: What a prompt baseline asks for, if the evaluation names none.

    Raises:
        ImportError: sentence-transformers is wanted and not installed.
        ValueError: a side without texts.
    """
    if isinstance(examples, Pairs):
        pairs = examples
        examples, others = _strings(pairs.positive), _strings(pairs.negative)
    if not examples or not others:
        raise ValueError("concept() needs examples and others; give both, or Pairs")
    embedding = _sentence_transformer(embed) if isinstance(embed, str) else embed
    wanted, unwanted = (_unit(embedding, side).mean(0) for side in (list(examples), list(others)))
    axis = wanted / wanted.norm() - unwanted / unwanted.norm()

    def measure(bench: Bench, arm: Arm, items: Sequence[Text]) -> Values:
        written = [[own.text for own in texts] for texts in bench.texts(arm, items)]
        scores = iter((_unit(embedding, [text for texts in written for text in texts]) @ axis).tolist())
        return [[next(scores) for _ in texts] for texts in written]

    return Meter(
        name,
        measure,
        "cosine",
        1,
        "text",
        items=fixed(prompts),
        proxy=True,
        instruction=instruction,
        options={
            "embed": embed if isinstance(embed, str) else getattr(embed, "__qualname__", "?"),
            # rounded: machines differ in the last bits of an embedding
            "axis": digest([round(value, 4) for value in axis.tolist()]),
        },
    )


def sentiment(prompts: Sequence[Text] | None = None, *, direction: int = 1, instruction: str = "") -> Meter:
    """VADER's compound score of the texts, -1 appalled to 1 delighted; a proxy.

    A lexicon of single words, 0 for text without any of them, so also for broken text: read it beside the fluency. Its
    mean over 32 texts varies by .15 from seed to seed; take at least 48 prompts and `samples=4`.

    Args:
        prompts: What the model continues; None: the prompts of the evaluation.
        direction: 1 if delight is wanted, -1 if dismay is.
        instruction: What a prompt baseline asks for, if the evaluation names none.

    Raises:
        ImportError: vaderSentiment is not installed.

    Source: Hutto and Gilbert (2014), ICWSM.
    """
    analyzer = _package("vaderSentiment.vaderSentiment", "vaderSentiment").SentimentIntensityAnalyzer()

    def compound(text: str) -> float:
        return float(analyzer.polarity_scores(text)["compound"])

    return scorer(
        compound, prompts, name="sentiment (VADER)", unit="compound", direction=direction, instruction=instruction
    )


def profanity(prompts: Sequence[Text] | None = None, *, direction: int = -1, instruction: str = "") -> Meter:
    """Probability that a text is profane, by the linear classifier of alt-profanity-check, 0 to 1; a proxy.

    It knows words, not what they are used for: a sentence on anatomy counts as profane, a polite threat does not.

    Args:
        prompts: What the model continues; None: the prompts of the evaluation.
        direction: -1 if it is unwanted, 1 if it is wanted.
        instruction: What a prompt baseline asks for, if the evaluation names none.

    Raises:
        ImportError: alt-profanity-check is not installed.

    Source: https://github.com/dimitrismistriotis/alt-profanity-check, a linear SVM on counts of words.
    """
    predict = _package("profanity_check", "alt-profanity-check").predict_prob

    def profane(text: str) -> float:
        return float(predict([text])[0])

    return scorer(profane, prompts, name="profanity", unit="probability", direction=direction, instruction=instruction)


def alignment(direction: Tensor, prompts: Sequence[Text] | None = None, *, tokens: int = 24, sign: int = 0) -> Meter:
    """Cosine of the control with a direction, such as the one by which a model refuses; 0 at tokens without control.

        a_t = <u_t, r> / (|u_t| |r|),   a mean over the sites where a controller acts

    A controller that was meant for something else and points along r does that, too.

    Args:
        direction: r, of the shape of the states where the controller acts: `[d]`, or `[head d_head]` at `z`.
        prompts: Whose continuations by the unsteered model are steered; None: the prompts of the evaluation.
        tokens: Length of the continuations.
        sign: 1 if the direction is wanted, -1 if it is not, 0 if it is only reported.

    Raises:
        ValueError: the direction has another shape than a control, or is zero.
    """
    r = direction.detach().double().cpu().flatten()
    if not r.norm() > 0:
        raise ValueError("the direction is zero; give one that is not")

    def measure(bench: Bench, arm: Arm, items: Sequence[Text]) -> Values:
        rows = bench.continuations(items, tokens, among=bench.prompts if prompts is None else prompts)
        found = []
        for u in bench.controls(arm, rows):
            if u.shape[2:] != direction.shape:
                raise ValueError(
                    f"the direction has the shape {list(direction.shape)}, {arm.name} acts on {list(u.shape[2:])}"
                )
            flat = u.flatten(2)
            found.append((flat @ (r / r.norm()) / flat.norm(dim=2).clamp_min(1e-30)).mean(0).tolist())
        return found

    return Meter(
        "alignment",
        measure,
        "cosine",
        sign,
        items=fixed(prompts),
        options={"tokens": tokens, "direction": digest(r.tolist())},
    )


def _unit(embed: Embed, texts: list[str]) -> Tensor:
    found = torch.as_tensor(embed(texts)).double().cpu()
    return found / found.norm(dim=1, keepdim=True).clamp_min(1e-12)


def _strings(texts: Sequence[Any]) -> list[str]:
    """The completion of a text that has one: a model is scored on what it writes after a prompt."""
    return [text[1] if isinstance(text, tuple) else str(text) for text in texts]


@cache
def _sentence_transformer(name: str) -> Embed:
    model = _package("sentence_transformers", "sentence-transformers").SentenceTransformer(name, device="cpu")

    def encode(texts: list[str]) -> Any:
        return model.encode(texts, show_progress_bar=False)

    return encode


def _package(module: str, name: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"this scorer needs {name}; pip install 'steerlens[eval]'") from error
