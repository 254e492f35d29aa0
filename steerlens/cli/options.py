"""Options of a method as they are typed: texts become values of the kinds that the method's signature names."""

from __future__ import annotations

import difflib
import inspect
import json
import re
import types
import typing
from collections import abc
from collections.abc import Sequence
from typing import Any

from steerlens import methods
from steerlens.cli.layers import parse_layers
from steerlens.control.linearization import Linearization
from steerlens.fit.contrast import Pairs
from steerlens.fit.method import Method, annotation, exported
from steerlens.hosts import host_of

#: Options that are layers, which `all` stands for too.
LAYERS = ("layers", "gate_layers")


def split_options(text: str) -> list[str]:
    """Options from one text; a comma between numbers separates layers, not options."""
    return re.split(r",(?=\s*\w+=)", text) if text else []


def known_method(name: str) -> Method:
    """A method by its name.

    Raises:
        ValueError: there is none of this name.
    """
    known = exported(methods)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"no method {name!r}; {hint}there are {', '.join(known)}")
    return known[name]


def read_options(method: Method, parts: Sequence[str]) -> dict[str, Any]:
    """Options of a method from texts `name=value`; a value is JSON, a range of layers such as `5-9`, or a string.

    `layers=all` stays as it is until the model is known, see `on_model`.

    Raises:
        ValueError: no `name=value`, no such option, or a value that is of no kind which the option takes.
    """
    takes = {
        name: parameter
        for name, parameter in inspect.signature(method.function).parameters.items()
        if name not in ("model", "data", "progress")
    }
    found: dict[str, Any] = {}
    for part in parts:
        name, equals, text = part.partition("=")
        name = name.strip()
        if not equals:
            raise ValueError(f"{part!r} is no option; write name=value")
        if name not in takes:
            near = difflib.get_close_matches(name, takes, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"{method.name} has no option {name!r}; {hint}it takes {', '.join(takes)}")
        if name in found:
            raise ValueError(f"{name} is given twice: {found[name]} and {text.strip()}")
        found[name] = value = _value(name, text.strip())
        if name in LAYERS and value == "all":
            continue
        hint = annotation(method.function, name)
        if not _fits(value, hint):
            raise ValueError(f"{method.name}: {name}={text} is {_kind(value)}; {name} takes {_words(hint)}")
    return found


def on_model(options: dict[str, Any], model: Any) -> dict[str, Any]:
    """The options with `all` as the layers that the model has."""
    every = list(range(host_of(model).n_layers))
    return {name: every if name in LAYERS and value == "all" else value for name, value in options.items()}


def _value(name: str, text: str) -> Any:
    if name == "condition":
        return Pairs.from_file(text)
    if name == "linearization":
        return Linearization.load(text)
    if name in LAYERS and text != "all" and not text.startswith("[") and text not in ("null", "None"):
        found = parse_layers(text, name, every="all")
        return found[0] if text.isdigit() else found
    if name == "where" and re.fullmatch(r"(-?\d+)?:(-?\d+)?", text):
        start, _, stop = text.partition(":")
        return slice(int(start) if start else None, int(stop) if stop else None)
    if re.fullmatch(r"-?\d+(,-?\d+)+", text):
        return [int(number) for number in text.split(",")]
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except json.JSONDecodeError:
        return text


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of JSON is of a kind that an annotation allows."""
    if hint is Any or hint is None:
        return hint is Any or value is None
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is typing.Literal:
        return value in inner
    if origin in (abc.Sequence, list, tuple):
        return isinstance(value, list) and all(_fits(each, inner[0]) for each in value)
    kind = origin or hint
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(kind, type) and isinstance(value, kind)


def _kind(value: Any) -> str:
    return {"str": "a text", "bool": "a truth value", "list": "a list", "NoneType": "null"}.get(
        type(value).__name__, f"a number ({type(value).__name__})"
    )


def _words(hint: Any) -> str:
    names = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
        type(None): "null",
        slice: "2:5",
    }
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(filter(None, map(_words, inner)))
    if origin is typing.Literal:
        return ", ".join(map(str, inner))
    if origin in (abc.Sequence, list, tuple):
        plural = {int: "whole numbers", float: "numbers"}.get(inner[0], "texts")
        return f"{plural}, such as {'0,3 or 0-3' if inner[0] is int else '[0.5, 1]'}"
    return "null" if hint is type(None) else names.get(hint, "")  # a tensor or a function cannot be typed
