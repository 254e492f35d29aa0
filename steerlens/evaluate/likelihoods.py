"""Meters on the logits of texts that are given: exact, cheap, and the same for every controller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from steerlens.diagnose.metrics import Tokens
from steerlens.diagnose.metrics import logit_difference as difference_of
from steerlens.evaluate.bench import Arm, Bench
from steerlens.evaluate.meter import Meter, Values, fixed
from steerlens.fit.contrast import Pairs, Text
from steerlens.fit.shipped import shipped_texts
from steerlens.hosts.batches import Row

PER = ("token", "text")


def kl(prompts: Sequence[Text] | None = None, *, at: str = "mean", tokens: int = 24) -> Meter:
    """How far a controller moves the model's next-token distribution, in nats per token; what budgets are made of.

        KL_t = sum_v p_t(v) (log p_t(v) - log q_t(v)),   p unsteered, q steered

    at each token of the unsteered model's own continuations of the prompts, sampled at temperature 1.

    Args:
        prompts: Where it is measured; None: the prompts of the evaluation.
        at: `"mean"`, over the items, or a percentile of all tokens such as `"p95"`.
        tokens: Length of the continuations.
    """

    def measure(bench: Bench, arm: Arm, items: Sequence[Text]) -> Values:
        plain = bench.continuations(items, tokens, among=bench.prompts if prompts is None else prompts)
        rows = plain
        if arm.instruction:
            rows = [(bench.prompt(text, arm), completion) for text, (_, completion) in zip(items, plain, strict=True)]
        return bench.divergences(arm, rows, plain)

    options = {"tokens": tokens}
    return Meter("KL", measure, "nats/token", -1, at=at, items=fixed(prompts), columns=("mean", "p95"), options=options)


def propensity(items: Pairs | Sequence[tuple[Text, str, str]], *, per: str = "token", instruction: str = "") -> Meter:
    """How much likelier the wanted completion is than the unwanted one, in nats.

        m = mean_t log p(a+_t | prompt, a+_<t) - mean_t log p(a-_t | prompt, a-_<t)

    It also grows if the unwanted side becomes unlikely because the text falls apart: read it together with the KL.

    Args:
        items: `(prompt, wanted, unwanted)`, the prompt a string or chat messages; or `Pairs`, preferably with
            completions.
        per: `"token"`: means over the completion's tokens; `"text"`: sums.
        instruction: What a prompt baseline asks for, if the evaluation names none.

    Raises:
        ValueError: an unknown `per`, or sides of different number.
    """
    if per not in PER:
        raise ValueError(f"per={per!r}; it is one of {', '.join(PER)}")
    if isinstance(items, Pairs):
        if len(items.positive) != len(items.negative):
            raise ValueError(f"{len(items.positive)} positive and {len(items.negative)} negative texts; give pairs")
        sides: list[tuple[Any, Any]] = list(zip(items.positive, items.negative, strict=True))
    else:
        sides = [((prompt, wanted), (prompt, unwanted)) for prompt, wanted, unwanted in items]

    def measure(bench: Bench, arm: Arm, pairs: Sequence[tuple[Text, Text]]) -> Values:
        levels = _levels(bench, arm, [text for pair in pairs for text in pair], per)
        return [[a - b] for a, b in zip(levels[::2], levels[1::2], strict=True)]

    return Meter(
        "propensity",
        measure,
        f"nats/{per}",
        items=tuple(sides),
        options={"per": per},
        prompts=_prompts([wanted for wanted, _ in sides]),
        instruction=instruction,
    )


def ab(items: Sequence[tuple[Text, str, str]], *, instruction: str = "") -> Meter:
    """The log-odds of the matching answer of a two-way question, in nats: `log p(match) - log p(other)`.

    Args:
        items: `(question, match, other)`, such as `("... Answer:", " (A)", " (B)")`.
        instruction: What a prompt baseline asks for, if the evaluation names none.
    """
    meter = propensity(items, per="text", instruction=instruction)
    return replace(meter, name="A/B", unit="nats")


def likelihood(texts: Sequence[Text], *, instruction: str = "") -> Meter:
    """Log probability per token of texts that show the wanted behaviour, in nats.

    Unlike a difference it does not reward making other texts unlikely.

    Args:
        texts: `(prompt, completion)` or strings, scored from their second token on.
        instruction: What a prompt baseline asks for, if the evaluation names none.
    """

    def measure(bench: Bench, arm: Arm, items: Sequence[Text]) -> Values:
        return [[level] for level in _levels(bench, arm, items, "token")]

    return Meter(
        "log likelihood",
        measure,
        "nats/token",
        items=fixed(texts),
        prompts=_prompts(texts),
        instruction=instruction,
    )


def neutral_loss(texts: Sequence[Text] | None = None) -> Meter:
    """The steered model's loss on texts that have nothing to do with the behaviour, in nats per token.

    Args:
        texts: Strings or `(prompt, completion)`; default: neutral sentences that come with steerlens.
    """
    texts = shipped_texts("neutral") if texts is None else texts

    def measure(bench: Bench, arm: Arm, items: Sequence[Text]) -> Values:
        return [[-level] for level in _levels(bench, arm, items, "token")]

    return Meter("neutral loss", measure, "nats/token", -1, items=fixed(texts))


def logit_difference(prompts: Sequence[Text] | None, a: Tokens, b: Tokens, *, instruction: str = "") -> Meter:
    """The logit of `a` minus that of `b` for the token after a prompt, in logits.

    Args:
        prompts: Where it is measured; None: the prompts of the evaluation.
        a, b: Each a token, as an id or a string that is one token, or a list of tokens, whose logits are averaged.
        instruction: What a prompt baseline asks for, if the evaluation names none.
    """

    def measure(bench: Bench, arm: Arm, items: Sequence[Text]) -> Values:
        metric = difference_of(bench.host, a, b)
        rows: list[Row] = [(bench.prompt(text, arm), []) for text in items]
        return bench.logits(arm, rows, lambda _, logits: [float(metric(logits[None]))])

    options = {"a": repr(a), "b": repr(b)}
    return Meter("logit difference", measure, "logits", items=fixed(prompts), options=options, instruction=instruction)


#: Form of `mc` -> unit.
FORMS = {"mc1": "share", "mc2": "probability", "margin": "nats/token"}


def mc(
    items: Sequence[tuple[Text, Sequence[str], Sequence[str]]], *, form: str = "mc2", instruction: str = ""
) -> Meter:
    """Multiple choice by likelihood, as TruthfulQA is scored.

        mc1 = 1 if the first right answer is likelier than every wrong one
        mc2 = sum_right p / (sum_right p + sum_wrong p)
        margin = mean_right log p per token - mean_wrong log p per token

    Args:
        items: `(question, right answers, wrong answers)`.
        form: `"mc1"`, `"mc2"` or `"margin"`; the margin moves long before a choice does.
        instruction: What a prompt baseline asks for, if the evaluation names none.

    Raises:
        ValueError: an unknown form, or an item without right or without wrong answers.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r}; it is one of {', '.join(FORMS)}")
    for index, (_, right, wrong) in enumerate(items):
        if not right or not wrong:
            raise ValueError(f"item {index} has {len(right)} right and {len(wrong)} wrong answers; it needs both")

    def measure(bench: Bench, arm: Arm, items: Sequence[Any]) -> Values:
        texts = [(question, answer) for question, right, wrong in items for answer in (*right, *wrong)]
        levels = iter(_levels(bench, arm, texts, "token" if form == "margin" else "text"))
        found = []
        for _, right, wrong in items:
            good, bad = ([next(levels) for _ in side] for side in (right, wrong))
            found.append([_choice(form, torch.tensor(good).double(), torch.tensor(bad).double())])
        return found

    name = "MC margin" if form == "margin" else form.upper()
    questions = tuple(question for question, _, _ in items)
    return Meter(name, measure, FORMS[form], items=fixed(items), prompts=questions, instruction=instruction)


def _choice(form: str, right: Tensor, wrong: Tensor) -> float:
    if form == "mc1":
        return float(right[0] > wrong.max())
    if form == "margin":
        return float(right.mean() - wrong.mean())
    return float((right.logsumexp(0) - torch.cat([right, wrong]).logsumexp(0)).exp())


def _levels(bench: Bench, arm: Arm, texts: Sequence[Text], per: str) -> list[float]:
    """Log probability of each text's completion, its sum or its mean over tokens."""
    found = bench.likelihoods(arm, [bench.row(text, arm) for text in texts])
    return [float(own.double().mean() if per == "token" else own.double().sum()) for own in found]


def _prompts(texts: Sequence[Text]) -> tuple[Any, ...] | None:
    """The prompts of texts, or None if one has no completion."""
    found = tuple(text[0] for text in texts if isinstance(text, tuple))
    return found if len(found) == len(texts) else None
