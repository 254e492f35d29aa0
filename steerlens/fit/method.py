"""The decorator that makes a function a method: it does what all methods have in common."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import torch

from steerlens.core import Controller, check_where
from steerlens.fit.card import Card
from steerlens.fit.directions import own_directions
from steerlens.fit.goal import goals_of
from steerlens.fit.reading import check_concepts, check_contrast, check_option, check_paired
from steerlens.fit.recipe import plain, recipe
from steerlens.fit.retune import RETUNES, Retune
from steerlens.hosts import host_of

Function = TypeVar("Function", bound=Callable[..., Controller])


def method(
    *,
    card: Card,
    exceptions: Mapping[str, str] | None = None,
    paper: Mapping[str, Any] | None = None,
    only: Mapping[str, Collection[str]] | None = None,
    retune: Retune | None = None,
) -> Callable[[Function], Function]:
    """Make a steering method of a function `name(model, data, *, ...) -> Controller`.

        @method(card=Card(needs="sets", points=POINTS))
        def caa(model, data, *, layers=None, form: Literal["add", "piecewise"] = "add"): ...

    The function finds the model's `Host` as `model`, data of the kind that the card names, and in each argument that is
    annotated as a `Literal` (or None) one of its words. It
    returns loops and, as the controller's recipe, what fitting found (`Controller(loops, {"threshold": 0.3})`, or
    nothing). The caller gets these loops, named after the method unless they have names, with the whole recipe: method,
    version, all arguments of the call, what was found, the model's fingerprint and the data's hash.

    Args:
        card: What the method needs and where it acts.
        exceptions: Checks or hosts of `steerlens.testing` that it cannot pass, with the words of the error.
        paper: Arguments whose defaults are not the published ones, and the published ones: with `paper=True` these are
            the defaults. The function has the argument `paper`, and need not look at it.
        only: For a card with `features`: the arguments that apply to contrast texts alone, under `"texts"`, and to
            features alone, under `"features"`. The recipe holds those that apply.
        retune: Arguments that `Controller.retuned` changes without a refit, in addition to `strength`.

    Raises:
        TypeError: the function does not begin with model and data, or the declaration names what is no argument of it.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        name = function.__name__
        if list(signature.parameters)[:2] != ["model", "data"]:
            raise TypeError(f"{name}{signature} is no method; its first two arguments are model and data")
        limited = {argument for arguments in (only or {}).values() for argument in arguments}
        read = {argument: _words(annotation(function, argument)) for argument in signature.parameters}
        choices = {argument: words for argument, words in read.items() if words}
        named = {*(paper or ()), *(["paper"] if paper else []), *limited}
        if retune is not None and not callable(retune.names):
            named |= set(retune.names)
        unknown = sorted(named - set(signature.parameters))
        if unknown:
            raise TypeError(f"{name} declares {unknown[0]!r}, which is no argument of it")

        @functools.wraps(function)
        def fit(*args: Any, **kwargs: Any) -> Controller:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{name}() {error}") from None
            _check_only(signature, bound.arguments, only or {})
            if bound.arguments.get("paper"):
                bound.arguments.update({**(paper or {}), **bound.arguments})
            bound.apply_defaults()
            model, data = bound.arguments["model"], bound.arguments["data"]
            beside = {"model", "data", *(only or {}).get("texts" if goals_of(data) else "features", ())}
            asked = {argument: value for argument, value in bound.arguments.items() if argument not in beside}
            for option, known in choices.items():
                check_option(option, bound.arguments[option], known)
            _check_common(asked, signature)
            host = bound.arguments["model"] = host_of(model)
            _check_data(name, card, data)
            # what is made in inference mode can enter no graph, neither of a fit nor of a later steered pass
            with torch.inference_mode(False):
                fitted = function(*bound.args, **bound.kwargs)
            loops = [loop.replace(name=name) if loop.name == "loop" else loop for loop in fitted.loops]
            return Controller(loops, recipe(name, host, asked, found=fitted.recipe, data=data))

        RETUNES[name] = retune or Retune()
        fit.method = Method(name, fit, card, dict(exceptions or {}))  # type: ignore[attr-defined]
        return cast(Function, fit)

    return decorate


@dataclass(frozen=True)
class Method:
    """What is known of a method in addition to the function itself.

    Attributes:
        name: Of the function and of its file.
        function: As the user calls it.
        card: What it needs and where it acts.
        exceptions: What it cannot promise: name of a check or host to words of the error.
    """

    name: str
    function: Callable[..., Controller]
    card: Card
    exceptions: dict[str, str] = field(default_factory=dict)

    @property
    def document(self) -> str:
        """The docstring."""
        return inspect.getdoc(self.function) or ""

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return self.document.partition("\n")[0]

    @property
    def source(self) -> str:
        """The docstring's paragraph that names the paper, or nothing."""
        _, _, source = self.document.partition("\nSource: ")
        return " ".join(source.split("\n\n")[0].split())


def declared(function: Any) -> Method | None:
    """What a method declares; None for anything else."""
    found = getattr(function, "method", None)
    return found if isinstance(found, Method) else None


def exported(package: ModuleType) -> dict[str, Method]:
    """The methods that a package exports, by name, in alphabetical order."""
    return {name: known for name, value in sorted(vars(package).items()) if (known := declared(value))}


def check_exports(package: ModuleType) -> None:
    """Raises ImportError for a file of a package of methods whose method is missing or not exported."""
    for entry in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{entry.name}")
        if declared(vars(module).get(entry.name)) is None:
            raise ImportError(f"{module.__file__} defines no method named {entry.name}; decorate one with @method")
        if entry.name not in exported(package):
            raise ImportError(
                f"{package.__file__} does not export {entry.name}; add the line "
                f"from {module.__name__} import {entry.name} as {entry.name}"
            )


def annotation(function: Callable[..., Any], argument: str) -> Any:
    """What an argument is annotated with; Any if that needs a library which is not imported."""
    function = inspect.unwrap(function)
    alone = SimpleNamespace(__annotations__={argument: function.__annotations__.get(argument, Any)})
    try:
        return get_type_hints(alone, function.__globals__)[argument]
    except (NameError, TypeError):
        return Any


def _words(hint: Any) -> tuple[Any, ...]:
    """All values that an annotation allows, if it is a `Literal` or a union of these and None; else nothing."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    parts = [(None,) if part is type(None) else _words(part) for part in get_args(hint)]
    union = get_origin(hint) in (Union, UnionType)
    return tuple(word for part in parts for word in part) if union and all(parts) else ()


def _check_common(asked: Mapping[str, Any], signature: inspect.Signature) -> None:
    """Raises for token positions that do not exist, and a strength that is no finite number."""
    # None as the default: the method chooses by its other options
    if "where" in asked and not (asked["where"] is None and signature.parameters["where"].default is None):
        check_where(asked["where"])
    strength = asked.get("strength", 1.0)
    try:
        number = float(strength)
    except (TypeError, ValueError):
        raise TypeError(f"strength={strength!r}; it is one number, a factor on the control") from None
    if not math.isfinite(number):
        raise ValueError(f"strength={strength!r}; it must be finite")


def _check_only(signature: inspect.Signature, given: Mapping[str, Any], only: Mapping[str, Collection[str]]) -> None:
    """Raises for an argument that does not apply to the kind of data that was given."""
    features = bool(goals_of(given["data"]))
    for argument in only.get("texts" if features else "features", ()):
        default = signature.parameters[argument].default
        if argument in given and plain(given[argument]) != plain(default):
            if features:
                words = "contrast texts, and data are features, whose level and site feature() sets"
            else:
                words = "features of autoencoders, and data are contrast texts"
            raise ValueError(f"{argument}= is for {words}; leave it out")


def _check_data(name: str, card: Card, data: Any) -> None:
    """Raises unless the data are of the kind that the card names; what only some options need, the method checks."""
    if card.needs == "texts" or (card.features and goals_of(data)) or (card.vectors and own_directions(data)):
        return
    if card.concepts:
        check_concepts(data)
    elif card.needs == "pairs":
        check_paired(name, data)
    else:
        check_contrast(data)
