"""The registry of parts: what a file may name, and which attributes of which type each of them has."""

from __future__ import annotations

import dis
import inspect
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

from torch import Tensor

from steerlens.core.law import Law, Loop, Setpoint
from steerlens.core.part import Part
from steerlens.core.prompt import Condition, Direction, Gate, Schedule, Summary
from steerlens.core.sites import Site


def registry(own: Iterable[type[Part]] = ()) -> dict[str, type[Part]]:
    """Every part that a file may name, by bare class name: those of steerlens, and classes of the user's own.

    Raises:
        TypeError: something that is no class of parts.
        ValueError: two classes of one name.
    """
    known: dict[str, type[Part]] = {}
    for kind in [*_shipped(Part), *own]:
        if not (isinstance(kind, type) and issubclass(kind, Part)):
            raise TypeError(f"laws holds {kind!r}; give your own subclasses of Law, Setpoint or Condition")
        other = known.setdefault(kind.__name__, kind)
        if other is not kind:
            raise ValueError(
                f"{_path(kind)} and {_path(other)} have one name, and a file names classes by their names: rename yours"
            )
    return known


def _shipped(base: type[Part]) -> Iterator[type[Part]]:
    """Classes of steerlens that were imported with it; what a function defines is not among them."""
    for kind in base.__subclasses__():
        mine = kind.__module__.split(".")[0] == "steerlens" and "<locals>" not in kind.__qualname__
        # abstract classes have no constructor
        if mine and "__init__" in vars(kind):
            yield kind
        yield from _shipped(kind)


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


@cache
def fields_of(kind: type) -> dict[str, Any]:
    """The attributes of a part and their types: what its constructors assign and what class bodies annotate.

    The type is that of the annotation, or of the constructor's parameter of the same name, or any. An attribute for
    which the class itself has a value, as `signals`, may be missing in an instance.
    """
    annotated: dict[str, Any] = {}
    assigned: dict[str, Any] = {}
    for base in reversed(kind.__mro__[:-1]):
        annotated.update(_hints(base))
        constructor = vars(base).get("__init__")
        if isinstance(constructor, types.FunctionType):
            parameters = _hints(constructor)
            assigned.update({name: parameters.get(name, Any) for name in _assigned(constructor)})
    # a parameter may be converted before it is kept, so that an annotation in the class body counts for more
    found = {**assigned, **annotated}
    return {name: hint for name, hint in found.items() if not isinstance(_class_value(kind, name), property)}


def _assigned(constructor: types.FunctionType) -> list[str]:
    """Names of the attributes that a constructor sets."""
    stored = [step.argval for step in dis.get_instructions(constructor) if step.opname == "STORE_ATTR"]
    return list(dict.fromkeys(stored))


def _class_value(kind: type, name: str) -> Any:
    return inspect.getattr_static(kind, name, None)


def _hints(thing: Any) -> dict[str, Any]:
    """Annotations of a class body or function; one that cannot be resolved stands for anything."""
    home = inspect.getmodule(thing)
    names = {**vars(typing), **_NAMES, **(vars(home) if home else {})}
    found = {}
    for name, hint in (getattr(thing, "__annotations__", None) or {}).items():
        holder = type("holder", (), {"__annotations__": {name: hint}})  # a class may have a ClassVar
        try:
            found[name] = typing.get_type_hints(holder, names)[name]
        except (NameError, TypeError, AttributeError, SyntaxError):
            found[name] = Any
    return {name: hint for name, hint in found.items() if typing.get_origin(hint) is not typing.ClassVar}


#: Names that annotations of parts use, some of them imported for type checkers only.
_NAMES = {
    kind.__name__: kind for kind in (Law, Setpoint, Condition, Summary, Gate, Schedule, Direction, Site, Tensor, Loop)
} | {"Sequence": Sequence}


def check_state(kind: type, state: dict[str, Any], what: str) -> None:
    """Raises ValueError unless the attributes are those of the class, and each of its type."""
    fields = fields_of(kind)
    unknown = sorted(set(state) - set(fields))
    if unknown:
        raise ValueError(
            f"{what} has {_words(unknown)}, which {kind.__name__} does not declare; it declares {_words(fields)}"
        )
    missing = [name for name in fields if name not in state and not hasattr(kind, name)]
    if missing:
        raise ValueError(f"{what} lacks {_words(missing)}, which every {kind.__name__} has")
    for name, value in state.items():
        if not fits(value, fields[name]):
            raise ValueError(f"{what}.{name} is {_shown(value)}, it should be {_type_name(fields[name])}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type. An int is a float, a bool is neither; a list is any sequence."""
    if hint is Any or isinstance(hint, typing.TypeVar):
        return True
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, each) for each in arguments)
    if origin is typing.Literal:
        return any(value == each and type(value) is type(each) for each in arguments)
    if hint is None or hint is type(None):
        return value is None
    if (origin or hint) in (list, tuple, Sequence, Iterable):
        if not isinstance(value, (list, tuple)):
            return False
        if (origin or hint) is tuple and arguments and arguments[-1] is not Ellipsis:
            return len(value) == len(arguments) and all(map(fits, value, arguments))
        return not arguments or all(fits(entry, arguments[0]) for entry in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return not isinstance(hint, type) or isinstance(value, hint)


def _shown(value: Any) -> str:
    if isinstance(value, Part):
        return f"a {type(value).__name__}"
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, (list, tuple)) and not (len(value) < 9 and all(type(each) in (int, str) for each in value)):
        return f"a {type(value).__name__} of {len(value)} entries"
    words = repr(value[:60] if isinstance(value, str) else value)
    return words if len(words) <= 60 else words[:57] + "..."


def _type_name(hint: Any) -> str:
    if isinstance(hint, type):
        return hint.__name__
    return str(hint).replace("typing.", "").replace("torch.", "").replace("collections.abc.", "")


def _words(names: Iterable[str]) -> str:
    return ", ".join(map(str, names)) or "nothing"


def check_part(part: Part, what: str) -> None:
    """Raises ValueError unless attributes, their types, and their values are those that the class allows."""
    check_state(type(part), vars(part), what)
    try:
        part.validate()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{what}: {error}") from None
