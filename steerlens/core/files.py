"""Controllers as files: loops as JSON in the header, which names classes of the registry of parts, and tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from steerlens.core.law import Loop
from steerlens.core.numbers import check_numbers
from steerlens.core.part import Part
from steerlens.core.positions import check_where
from steerlens.core.registry import check_part, fields_of, fits, registry
from steerlens.core.sites import Site
from steerlens.core.tensorfile import FORMAT, check_fingerprint, read, write

#: Largest depth of lists and parts within each other, number of loops, and number of values in all of them.
DEPTH, MOST_LOOPS, MOST_VALUES = 32, 10_000, 500_000
#: How often one loop may name one tensor: a law may copy it each time.
MOST_NAMED = 64


def write_controller(path: str | Path, loops: Iterable[Loop], recipe: dict[str, Any]) -> None:
    """Write loops and recipe; see `Controller.save`."""
    packer = _Packer()
    entries = [packer.loop(loop, f"loops.{index}") for index, loop in enumerate(loops)]
    try:
        json.dumps(recipe, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"the recipe holds what JSON does not ({error}); give plain numbers, texts and lists") from None
    write(path, {"kind": "controller", "recipe": recipe, "loops": entries}, packer.found)


def read_controller(path: str | Path, laws: Iterable[type[Part]]) -> tuple[list[Loop], dict[str, Any]]:
    """Loops and recipe; see `Controller.load`."""
    known = registry(laws)
    try:
        header, tensors = read(path, "controller")
        recipe, entries = header.get("recipe"), header.get("loops")
        if not isinstance(recipe, dict) or not isinstance(entries, list) or len(entries) > MOST_LOOPS:
            raise ValueError("its header holds no recipe, or no list of loops")
        check_recipe(recipe)
        unpacker = _Unpacker(tensors, known, old=header["format"] < FORMAT)
        loops = [unpacker.loop(entry, f"loops.{index}") for index, entry in enumerate(entries)]
        unread = sorted(set(tensors) - unpacker.used)
        if unread:
            raise ValueError(f"its tensor {unread[0]!r} belongs to no loop")
        check_numbers(loops)
    except ValueError as error:
        raise ValueError(f"{path} was not loaded: {error}") from None
    return loops, recipe


def check_recipe(recipe: dict[str, Any]) -> None:
    """Raises ValueError unless a recipe can be compared with a model and shown."""
    model = recipe.get("model")
    if model is not None and not isinstance(model, dict):
        raise ValueError("its recipe's model is no fingerprint")
    check_fingerprint(model or {})
    for name in ("method", "steerlens"):
        if not isinstance(recipe.get(name, ""), (str, type(None))):
            raise ValueError(f"its recipe's {name} is no text")
    for name in ("arguments", "found"):
        if not isinstance(recipe.get(name, {}), (dict, type(None))):
            raise ValueError(f"its recipe's {name} are no object")
    parts = recipe.get("parts", [])
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise ValueError("its recipe's parts are no list of recipes")
    for part in parts:
        check_recipe(part)


class _Packer:
    """Values as JSON, and the tensors in them by key; one that several loops share is written once."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}
        self._keys: dict[int, str] = {}
        self._held: list[Tensor] = []  # an id is free again once its tensor is gone
        self._kinds: dict[str, type] = dict(registry())

    def loop(self, loop: Loop, key: str) -> dict[str, Any]:
        """Every field of a loop but those that are empty."""
        values = {name: getattr(loop, name) for name in sorted(Loop.__slots__)}
        return {
            name: self.pack(value, f"{key}.{name}")
            for name, value in values.items()
            if value is not None and value != ()
        }

    def pack(self, value: Any, key: str) -> Any:
        """One value."""
        if isinstance(value, Tensor):
            return {"tensor": self._tensor(value, key)}
        if isinstance(value, Part):
            return self._part(value, key)
        if isinstance(value, tuple):
            return {"tuple": [self.pack(entry, f"{key}.{index}") for index, entry in enumerate(value)]}
        if isinstance(value, list):
            return [self.pack(entry, f"{key}.{index}") for index, entry in enumerate(value)]
        if isinstance(value, slice):
            return {"slice": [value.start, value.stop]}
        if isinstance(value, Site):
            return {"site": str(value)}
        if value is None or type(value) in (bool, int, float, str):
            return value
        if callable(value):
            raise TypeError(f"{key} is a callable, which a file cannot hold; use a slice or a mask")
        raise TypeError(
            f"{key} is a {type(value).__name__}; a law holds tensors, numbers, strings, lists and parts only"
        )

    def _part(self, part: Part, key: str) -> dict[str, Any]:
        kind = type(part)
        if self._kinds.setdefault(kind.__name__, kind) is not kind:
            raise ValueError(f"{key} is of a second class called {kind.__name__}; a file needs one name for each")
        check_part(part, key)
        state = {name: self.pack(entry, f"{key}.{name}") for name, entry in vars(part).items()}
        return {"class": kind.__name__, "state": state}

    def _tensor(self, tensor: Tensor, wish: str) -> str:
        key = self._keys.setdefault(id(tensor), wish)
        if key == wish:
            self._held.append(tensor)
            self.found[key] = tensor
        return key


class _Unpacker:
    """The inverse: nothing but what `_Packer` writes is accepted.

    Args:
        tensors: By key.
        known: Classes by name.
        old: The file is of format 2, which named classes by their modules and wrapped every value.
    """

    def __init__(self, tensors: dict[str, Tensor], known: dict[str, type[Part]], *, old: bool):
        self.used: set[str] = set()
        self._tensors, self._known, self._old = tensors, known, old
        self._named: dict[str, int] = {}  # tensors in the present loop
        self._values = 0

    def loop(self, entry: Any, what: str) -> Loop:
        """A loop, checked as if it were made here."""
        if not isinstance(entry, dict):
            raise ValueError(f"{what} is no JSON object")
        self._named = {}
        state = {name: self._field(name, value, f"{what}.{name}") for name, value in entry.items()}
        fields = fields_of(Loop)
        wrong = [name for name in state if name not in fields or not fits(state[name], fields[name])]
        missing = [name for name in ("law", "act", "sense") if name not in state]
        if wrong or missing:
            raise ValueError(f"{what} has no legal {(wrong or missing)[0]}")
        try:
            check_where(state.get("where", "last"))
            return Loop(state.pop("law"), state.pop("act"), state.pop("sense"), **state)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{what}: {error}") from None

    def _field(self, name: str, value: Any, what: str) -> Any:
        if not self._old or name in ("strength", "name", "group"):
            return self.unpack(value, what, 0)
        return _site(value, what) if name in ("act", "sense") else self._unwrap(value, what, 0)

    def unpack(self, entry: Any, what: str, depth: int) -> Any:
        """One value."""
        self._values += 1
        if depth > DEPTH or self._values > MOST_VALUES:
            raise ValueError(f"{what} is nested too deeply, or the file holds more than {MOST_VALUES} values")
        if entry is None or isinstance(entry, (bool, int, float, str)):
            return entry
        if isinstance(entry, list):
            return [self.unpack(item, f"{what}.{index}", depth + 1) for index, item in enumerate(entry)]
        if set(entry) == {"class", "state"}:
            return self._part(entry["class"], entry["state"], what, depth)
        if len(entry) == 1:
            ((form, held),) = entry.items()
            if form == "tensor":
                return self._tensor(held, what)
            if form == "site":
                return _site(held, what)
            if form == "slice":
                return _slice(held, what)
            if form == "tuple" and isinstance(held, list):
                return tuple(self.unpack(held, what, depth + 1))
        raise ValueError(f"{what} is in no known form")

    def _unwrap(self, entry: Any, what: str, depth: int) -> Any:
        """One value of format 2."""
        if isinstance(entry, dict) and set(entry) == {"value"}:
            if not isinstance(entry["value"], (dict, list)):
                return self.unpack(entry["value"], what, depth)
        elif isinstance(entry, dict) and set(entry) == {"list"} and isinstance(entry["list"], list):
            return [self._unwrap(item, f"{what}.{index}", depth + 1) for index, item in enumerate(entry["list"])]
        elif isinstance(entry, dict) and not set(entry) & {"tuple", "site"}:
            return self.unpack(entry, what, depth)
        raise ValueError(f"{what} is in no known form")

    def _part(self, name: Any, state: Any, what: str, depth: int) -> Part:
        if not isinstance(name, str) or not isinstance(state, dict):
            raise ValueError(f"{what} names no class")
        if self._old:
            name = name.rpartition(".")[2]
        kind: type | None = self._known.get(name)
        if kind is None:
            raise ValueError(
                f"{what} is a {name[:60]}, which this steerlens lacks; pass your own classes as laws=[...]"
            )
        decode = self._unwrap if self._old else self.unpack
        part: Part = object.__new__(kind)
        # only declared attributes come in, so that nothing of the class itself can be replaced
        values = {key: decode(value, f"{what}.{key}", depth + 1) for key, value in state.items()}
        part.__dict__.update({key: value for key, value in values.items() if key in fields_of(kind)})
        unknown = [key for key in values if key not in vars(part)]
        if unknown:
            raise ValueError(f"{what} has {unknown[0][:60]!r}, which {name} does not declare")
        check_part(part, what)
        return part

    def _tensor(self, key: Any, what: str) -> Tensor:
        if not isinstance(key, str) or key not in self._tensors:
            raise ValueError(f"{what} names a tensor that the file does not hold")
        self.used.add(key)
        self._named[key] = count = self._named.get(key, 0) + 1
        if count > MOST_NAMED:
            raise ValueError(f"{what} names the tensor {key[:60]!r} for the {count}th time, which no loop needs")
        return self._tensors[key]


def _site(name: Any, what: str) -> Site:
    if not isinstance(name, str):
        raise ValueError(f"{what} names no site")
    return Site.parse(name)


def _slice(bounds: Any, what: str) -> slice:
    legal = isinstance(bounds, list) and len(bounds) == 2
    if not legal or not all(bound is None or type(bound) is int for bound in bounds):
        raise ValueError(f"{what} is a slice whose bounds are no whole numbers")
    return slice(*bounds)
