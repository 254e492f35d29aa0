"""What a method says of itself, in its docstring and on its card, is so."""

from __future__ import annotations

import inspect
from typing import Any
from unittest.mock import patch

import torch

from steerlens.fit.card import NEEDS, Card
from steerlens.fit.contrast import Pairs
from steerlens.hosts import host_of
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
    """14. The docstring carries an equation, shapes or units, what is raised, the signals and the source."""
    document = case.declared.document
    for needed in (" = ", "Args:", "Returns:", "Raises:", "Recorded signals:", "Source:", "arXiv"):
        assert needed in document, f"the docstring of {case.method} lacks {needed!r}"


def check_card(case: Case) -> None:
    """16. What the method's card declares is so: data, points, derivatives, passes."""
    card = case.declared.card
    if case.family != "llama":
        return  # no family changes these facts, and finding them takes a dozen fits
    _check_data(case, card)
    _check_points(case, card)
    host = host_of(case.model)
    for kind, verb in (("activations", "gradients"), ("blocks", "nominal")):
        with patch.object(type(host), verb, side_effect=RuntimeError(f"{verb} was used")):
            used = False
            try:
                case.fit()
            except RuntimeError as error:
                used = f"{verb} was used" in str(error)
        assert used == (card.derivatives == kind), f"derivatives={card.derivatives!r}, but {verb}: {used}"
    ids, count = torch.tensor([case.prompt]), 5
    entrance = host.entrance()
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
        if order.index(kind) > enough + 1:
            continue  # what takes sets of texts takes any richer form of them
        said = None
        try:
            case.fit(data=data)
        except (TypeError, ValueError) as error:
            said = str(error)
        taken = order.index(kind) >= enough
        assert (said is None) == taken, f"the card says needs={card.needs!r}; with {kind}: {said or 'it fits'}"


def _check_points(case: Case, card: Card) -> None:
    """It acts where its card says, and nowhere else."""
    acts = {site.point for site in case.controller.sites}
    assert acts <= set(card.points), f"it acts at {acts}, the card says {card.points}"
    parameters = inspect.signature(case.declared.function).parameters
    # where there are components, they decide the point, and one alone does not do
    if "point" not in parameters or "component" in parameters:
        return
    for point in host_of(case.model).points():
        said = None
        try:
            fitted = case.fit(point=point)
            assert {site.point for site in fitted.sites} == {point}
        except ValueError as error:
            said = str(error)
        assert (said is None) == (point in card.points), f"{point}: {said or 'not on the card, but it fits'}"
