"""That public signatures say what is passed and returned: every parameter annotated, and none of them as anything."""

from __future__ import annotations

import inspect
import re
import types
import typing

import pytest

import steerlens as sl
import steerlens.core.types
import steerlens.hosts.types
from steerlens.core import record as recorded
from steerlens.evaluate import meter
from steerlens.sharing import torchfile, vectors

#: What cannot be said better, and why.
ALLOWED = {
    ("Record.to_cache", "model"): "the room of the record knows no library's models",
    ("Controller.push_to_hub", "evaluation"): "core does not know what an evaluation is; the card checks it",
    ("Loop.replace", "changes"): "fields of several types; the constructor that they go to checks them",
}
#: Aliases that stand for anything, each with its reason where it is defined.
OPEN = {"Json", "Memory", "Store", "Items", "Foreign", "Held"}
#: Special methods that users call through an operator.
OPERATORS = {"__getitem__", "__call__", "__add__", "__sub__", "__mul__", "__neg__", "__iter__"}


def public(name, value):
    """Functions of the public surface, by the name under which a user finds them."""
    if isinstance(value, types.ModuleType):
        own = [key for key, each in vars(value).items() if getattr(each, "__module__", "") == value.__name__]
        for inner in getattr(value, "__all__", [key for key in own if key[0] != "_"]):
            yield from public(f"{name}.{inner}", getattr(value, inner))
    elif inspect.isclass(value):
        yield name, value
        for inner, member in vars(value).items():
            if inner.startswith("_") and inner not in OPERATORS:
                continue
            member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if isinstance(member, types.FunctionType):
                yield f"{name}.{inner}", member
    elif callable(value) and not isinstance(value, types.GenericAlias) and typing.get_origin(value) is None:
        yield name, value


SURFACE = {id(value): (name, value) for each in sl.__all__ for name, value in public(each, getattr(sl, each))}


def faults(name, function):
    """Parameters without a type, or with that of anything; the constructor's if it is a class."""
    signature = inspect.signature(function)
    parts = {each.name: each.annotation for each in signature.parameters.values() if each.name not in ("self", "cls")}
    if not inspect.isclass(function):
        parts["return"] = signature.return_annotation
    for part, annotation in parts.items():
        if (name, part) in ALLOWED:
            continue
        if annotation is inspect.Parameter.empty:
            yield f"{name}: {part} has no type"
        elif re.search(r"\b(Any|object)\b", str(annotation)):
            yield f"{name}: {part} is {annotation}"


def fields(name, value):
    """Annotations in a class's body that say nothing."""
    for field, annotation in vars(value).get("__annotations__", {}).items():
        if not field.startswith("_") and re.search(r"\bAny\b", str(annotation)):
            yield f"{name}.{field} is {annotation}"


@pytest.mark.parametrize(("name", "value"), list(SURFACE.values()), ids=[name for name, _ in SURFACE.values()])
def test_every_part_of_a_public_signature_has_a_type(name, value):
    found = list(faults(name, value))
    if inspect.isclass(value):
        found += fields(name, value)
    assert found == []


def test_the_search_covers_the_surface_and_sees_what_is_missing():
    names = {name for name, _ in SURFACE.values()}
    assert {"steer", "lqr", "Controller.at", "Run.scoring", "evaluate.Bench.logits", "sae.hold", "apply"} <= names

    def loose(model, where: Any, layers: Layers) -> None: ...  # noqa: F821

    assert list(faults("loose", loose)) == ["loose: model has no type", "loose: where is Any"]
    for name, part in ALLOWED:
        assert part in inspect.signature(next(value for known, value in SURFACE.values() if known == name)).parameters


def test_only_the_aliases_that_say_so_stand_for_anything():
    for module in (steerlens.core.types, steerlens.hosts.types, recorded, meter, torchfile, vectors):
        source = inspect.getsource(module)
        aliases = re.findall(r"^(\w+): TypeAlias = (.*)$", source, re.M)
        assert aliases
        assert {name for name, meaning in aliases if "Any" in meaning} <= OPEN
