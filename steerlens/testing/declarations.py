"""What a method declares, in its docstring and on its card, is true."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from steerlens.core import Site
from steerlens.fit.card import NEEDS, Card
from steerlens.fit.contrast import Pairs
from steerlens.hosts import host_of
from steerlens.sae.feature import Target
from steerlens.sae.setpoint import Feature
from steerlens.sae.slices import Origin
from steerlens.testing.case import NEGATIVE, POSITIVE, Case


def check_signals_are_recorded(case: Case) -> None:
    """13. Every signal that a loop's law and the method's docstring name is recorded with its shape."""
    document = case.declared.document
    ids = torch.tensor([case.prompt, case.prompt[::-1]])
    with case.steer(record="all") as run:
        case.logits(ids)
    for site, names in run.signals.items():
        for loop_names in names.own:
            for signal, name in loop_names.items():
                assert f"`{signal}`" in document, f"the docstring of {case.method} does not name the signal {signal}"
                assert run.record[name].shape[:2] == ids.shape, f"{name} has shape {tuple(run.record[name].shape)}"
            assert run.record[loop_names["u"]].shape == (*ids.shape, *host_of(case.model).shape(site))


def check_docstring(case: Case) -> None:
    """14. The docstring carries an equation, all arguments, shapes or units, what is raised, signals and the source."""
    document, name = case.declared.document, case.method
    assert re.fullmatch(r"[A-Z].*\.", case.declared.summary), f"the docstring of {name} does not begin with a sentence"
    head, found, rest = document.partition("\nArgs:\n")
    assert found, f"the docstring of {name} lacks 'Args:'"
    assert re.search(r"^ {4,}.* = ", head, re.M), f"the docstring of {name} has no equation before its arguments"
    entries = re.findall(r"^ {4}(\w+(?:, \w+)*): \S", rest.split("\n\n")[0], re.M)
    documented = [argument for entry in entries for argument in entry.split(", ")]
    expected = list(inspect.signature(case.declared.function).parameters)
    missing, other = set(expected) - set(documented), set(documented) - set(expected)
    assert not missing, f"the docstring of {name} does not document {sorted(missing)}"
    assert not other, f"the docstring of {name} documents {sorted(other)}, which are no arguments"
    for section, pattern in (
        ("shapes or units", r"`\[[a-z][^\]]*\]`|\bunits?\b"),
        ("what is returned", r"^Returns:\n {4}\S"),
        ("what is raised", r"^Raises:\n {4}[A-Z]\w+: \S"),
        ("the recorded signals", r"Recorded\s+signals: [^.]*`u`|Recorded\s+signals:(.|\n)*`u`"),
    ):
        assert re.search(pattern, rest, re.M), f"the docstring of {name} lacks {section}"
    source = case.declared.source
    assert re.search(r"arXiv \d{4}\.\d{4,5}|doi|https?://", source), f"the source of {name} names no paper: {source!r}"


#: What a method needs of a model besides its activations -> verbs of the host that give it.
VERBS = {
    "activations": ("gradients",),
    "vectors": ("logits_with_graph",),
    "blocks": ("nominal",),
    "parameters": ("learner",),
    "weights": ("neuron_writes", "head_writes"),
}


def check_card(case: Case) -> None:
    """16. What the method's card declares is true: data, points, derivatives, passes."""
    card = case.declared.card
    with _verbs_used(type(host_of(case.model))) as used:
        _check_data(case, card)
    expected = set() if card.derivatives == "none" else {card.derivatives}
    assert used == expected, f"the card says derivatives={card.derivatives!r}, but fitting uses {sorted(used)}"
    _check_points(case, card)
    _check_passes(case, card)


def _check_passes(case: Case, card: Card) -> None:
    """As many forward passes at a prompt and at each generated token as the card says."""
    ids, count = torch.tensor([case.prompt]), 5
    entrance = host_of(case.model).entrance()
    calls: list[int] = []

    def counted(*args: Any, forward: Any = entrance.forward, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(*args, **kwargs)

    # not by a hook: a pass beside the user's own runs without hooks
    with patch.object(entrance, "forward", counted):
        case.generate(ids, count)
        plain = len(calls)
        calls.clear()
        with case.steer():
            case.generate(ids, count)
    extra = card.prompt_passes - 1 + (card.token_passes - 1) * (count - 1)
    assert len(calls) == plain + extra, f"{len(calls) - plain} passes more than unsteered, the card says {extra}"


@contextmanager
def _verbs_used(kind: type) -> Iterator[set[str]]:
    """Which of `VERBS` the hosts of a class are asked for."""
    used: set[str] = set()

    def noting(verb: Any, need: str) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            used.add(need)
            return verb(*args, **kwargs)

        return noted

    with ExitStack() as stack:
        for need, verbs in VERBS.items():
            for verb in verbs:
                stack.enter_context(patch.object(kind, verb, noting(getattr(kind, verb), need)))
        yield used


def _check_data(case: Case, card: Card) -> None:
    """The method takes the data that its card names, and no less."""
    bare = [prompt + completion for prompt, completion in POSITIVE]
    trials = {
        "texts": bare,
        "sets": Pairs(bare, [prompt + completion for prompt, completion in NEGATIVE[:2]]),
        "pairs": Pairs(bare, [prompt + completion for prompt, completion in NEGATIVE]),
        "completions": Pairs(POSITIVE, NEGATIVE),
    }
    order = list(NEEDS)
    enough = order.index(card.needs)
    for kind, data in trials.items():
        if order.index(kind) > enough:
            continue  # what takes sets of texts takes any richer form of them
        message = None
        try:
            case.fit(data=data)
        except (TypeError, ValueError) as error:
            message = str(error)
        taken = order.index(kind) >= enough
        assert (message is None) == taken, f"the card says needs={card.needs!r}; with {kind}: {message or 'it fits'}"
    if card.needs == "texts":
        return
    message = None
    try:
        case.fit(data=[trials["sets"], trials["completions"]])
    except TypeError as error:
        message = str(error)
    assert (message is None) == card.concepts, (
        f"the card says concepts={card.concepts}; with two: {message or 'it fits'}"
    )
    message = None
    try:
        case.fit(data=_feature(case))
    except TypeError as error:
        message = str(error)
    except ValueError:
        pass  # of such data it wants to know more, such as texts
    assert (message is None) == card.features, (
        f"the card says features={card.features}; with one: {message or 'it fits'}"
    )
    message = None
    try:
        case.fit(data=torch.ones(host_of(case.model).d_model))
    except TypeError as error:
        message = str(error)
    except ValueError:
        pass
    assert (message is None) == card.vectors, f"the card says vectors={card.vectors}; with one: {message or 'it fits'}"


def _feature(case: Case) -> Target:
    """One feature of an autoencoder that nobody trained."""
    host, site = host_of(case.model), Site(1, "resid_post")
    d = host.shape(site)[0]
    row, one = torch.ones(1, d), torch.ones(1)
    setpoint = Feature(row, one, 0 * one, 9 * one, 9 * one, row / d**0.5, labels=["0"])
    return Target(setpoint, site, (0,), (9.0,), (9.0,), Origin(d, host.processed, None))


def _check_points(case: Case, card: Card) -> None:
    """It acts where its card says, and nowhere else."""
    acts = {site.point for site in case.controller.sites}
    assert acts <= set(card.points), f"it acts at {acts}, the card says {card.points}"
    parameters = inspect.signature(case.declared.function).parameters
    # where there are components, they decide the point, and one alone does not do
    if "point" not in parameters or "component" in parameters:
        return
    for point in host_of(case.model).points():
        message = None
        try:
            fitted = case.fit(point=point)
            assert {site.point for site in fitted.sites} == {point}
        except ValueError as error:
            message = str(error)
        assert (message is None) == (point in card.points), f"{point}: {message or 'not on the card, but it fits'}"
