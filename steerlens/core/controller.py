"""What every method returns: loops and where they came from, as data that composes, scales, saves and loads."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerlens.core.law import Loop, finite
from steerlens.core.part import Part, tensors_of
from steerlens.core.positions import check_where
from steerlens.core.sites import Site

#: Of the files; 1 was that of the days before the first release.
FORMAT = 2


class Controller:
    """Feedback loops and their provenance. Data only: `steerlens.steer` attaches it to a model.

    `a + b` composes (loops at one site act in that order), `a * s` multiplies every control by `s` (`a * 0` steers
    nothing, bit for bit), `a.at(where)` moves it to other tokens, `a.only(layers)` keeps the loops of some layers.

    Attributes:
        loops: In the order of composition.
        recipe: Provenance as plain JSON: method, version, arguments, model fingerprint, hash of the data.
    """

    def __init__(self, loops: Iterable[Loop], recipe: dict[str, Any] | None = None):
        self.loops = tuple(loops)
        self.recipe = dict(recipe or {})
        for loop in self.loops:
            check_where(loop.where)
            for summary in loop.summaries:
                check_where(summary.where)

    def __add__(self, other: Controller) -> Controller:
        if not isinstance(other, Controller):
            return NotImplemented
        # what a controller's loops remember stays its own
        offset = max((loop.group for loop in self.loops), default=-1) + 1
        moved = tuple(loop.replace(group=loop.group + offset) for loop in other.loops)
        model = self.recipe.get("model") or other.recipe.get("model")
        return Controller(self.loops + moved, {"method": "+", "parts": [self.recipe, other.recipe], "model": model})

    def __mul__(self, factor: float) -> Controller:
        by = finite("factor", factor)
        return self._each(lambda loop: loop.replace(strength=loop.strength * by))

    __rmul__ = __mul__

    def at(self, where: Any) -> Controller:
        """The same loops at other token positions; the forms of `where` are those of `Loop`."""
        check_where(where)
        return self._each(lambda loop: loop.replace(where=where))

    def only(self, layers: Iterable[int]) -> Controller:
        """The loops that act at the given layers."""
        kept = set(layers)
        missing = kept - {site.layer for site in self.sites}
        if missing:
            raise ValueError(f"no loop acts at layers {sorted(missing)}; this controller acts at {self.layers}")
        return Controller([loop for loop in self.loops if loop.act.layer in kept], self.recipe)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Controller:
        """The same loops with their tensors on another device or, for floating ones, in another dtype."""

        moved: dict[int, Tensor] = {}  # loops share a direction of the size of the model

        def move(tensor: Tensor) -> Tensor:
            if id(tensor) not in moved:
                moved[id(tensor)] = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
            return moved[id(tensor)]

        return self._each(lambda loop: loop.change(move))

    @property
    def sites(self) -> list[Site]:
        """Where it acts, in the order of the forward pass."""
        return sorted({loop.act for loop in self.loops})

    @property
    def layers(self) -> list[int]:
        """Layers where it acts."""
        return sorted({site.layer for site in self.sites})

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        tensors = {id(tensor): tensor for tensor in tensors_of([loop.parts for loop in self.loops])}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def __repr__(self) -> str:
        method = self.recipe.get("method", "?")
        size = f"{self.nbytes / 1e3:.0f} kB"
        return f"Controller({method}: {len(self.loops)} loops at layers {_ranges(self.layers)}, {size})"

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file: tensors, and everything else as JSON in its header.

        Raises:
            TypeError: a loop's `where` is a callable, which a file cannot hold; use a slice or a mask.
        """
        from safetensors.torch import save_file

        tensors = _Tensors()
        loops = [_pack_loop(loop, f"loops.{index}", tensors) for index, loop in enumerate(self.loops)]
        header = {"format": FORMAT, "recipe": self.recipe, "loops": loops}
        save_file(tensors.found, str(path), metadata={"steerlens": json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path, *, laws: Iterable[type[Part]] = ()) -> Controller:
        """Read a file written by `save`. Holds tensors and JSON only: nothing in it is executed.

        Args:
            laws: Your own law and setpoint classes that the file may name; those of steerlens are known.

        Raises:
            ValueError: not a controller file, or it names a class that is neither in steerlens nor in `laws`.
        """
        from safetensors import safe_open

        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get("steerlens")
            if text is None:
                raise ValueError(f"{path} is a safetensors file without a steerlens header; it holds no controller")
            # cloned: a file's tensors begin at any byte, and a BLAS rounds unaligned ones differently
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
        header = json.loads(text)
        if header["format"] != FORMAT:
            raise ValueError(f"{path} has format {header['format']}, this version of steerlens reads format {FORMAT}")
        known = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in laws}
        return cls([_unpack_loop(entry, tensors, known) for entry in header["loops"]], header["recipe"])

    def _each(self, change: Any) -> Controller:
        return Controller([change(loop) for loop in self.loops], self.recipe)


def _ranges(layers: list[int]) -> str:
    if layers and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])
    return ", ".join(map(str, layers)) or "none"


class _Tensors:
    """The tensors of a file by key; one that several loops share is written once."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}
        self._keys: dict[int, str] = {}
        self._held: list[Tensor] = []  # an id is free again once its tensor is gone

    def key(self, tensor: Tensor, wish: str) -> str:
        """The key of a tensor: the one it has already, or `wish`."""
        key = self._keys.setdefault(id(tensor), wish)
        if key == wish:
            self._held.append(tensor)
            self.found[key] = tensor.detach().contiguous().clone()
        return key


def _pack_loop(loop: Loop, key: str, tensors: _Tensors) -> dict[str, Any]:
    packed = {
        "law": _pack(loop.law, f"{key}.law", tensors),
        "act": str(loop.act),
        "sense": str(loop.sense),
        "where": _pack(loop.where, f"{key}.where", tensors),
        "strength": loop.strength,
        "name": loop.name,
        "group": loop.group,
    }
    for name in _OPTIONAL:
        value = getattr(loop, name)
        if value:
            packed[name] = _pack(value, f"{key}.{name}", tensors)
    return packed


#: Fields of a loop that most loops do without.
_OPTIONAL = ("gates", "schedules", "summary", "tangent")


def _unpack_loop(entry: dict[str, Any], tensors: dict[str, Tensor], known: dict[str, type[Part]]) -> Loop:
    return Loop(
        _unpack(entry["law"], tensors, known),
        Site.parse(entry["act"]),
        Site.parse(entry["sense"]),
        where=_unpack(entry["where"], tensors, known),
        strength=entry["strength"],
        name=entry["name"],
        group=entry["group"],
        **{name: _unpack(entry[name], tensors, known) for name in _OPTIONAL if name in entry},
    )


def _pack(value: Any, key: str, tensors: _Tensors) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": tensors.key(value, key)}
    if isinstance(value, Part):
        state = {name: _pack(entry, f"{key}.{name}", tensors) for name, entry in vars(value).items()}
        return {"class": f"{type(value).__module__}.{type(value).__qualname__}", "state": state}
    if isinstance(value, (list, tuple)):
        return {"list": [_pack(entry, f"{key}.{index}", tensors) for index, entry in enumerate(value)]}
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    if callable(value):
        raise TypeError(f"{key} is a callable, which a file cannot hold; use a slice or a mask")
    raise TypeError(f"{key} is a {type(value).__name__}; a law holds tensors, numbers, strings, lists and parts only")


def _unpack(entry: dict[str, Any], tensors: dict[str, Tensor], known: dict[str, type[Part]]) -> Any:
    if "tensor" in entry:
        return tensors[entry["tensor"]]
    if "list" in entry:
        return [_unpack(item, tensors, known) for item in entry["list"]]
    if "slice" in entry:
        return slice(*entry["slice"])
    if "value" in entry:
        return entry["value"]
    kind = known.get(entry["class"]) or _own_class(entry["class"])
    part = object.__new__(kind)
    part.__dict__.update({name: _unpack(item, tensors, known) for name, item in entry["state"].items()})
    return part


def _own_class(path: str) -> type[Part]:
    """A part defined in steerlens; nothing outside the package is imported for a file."""
    module, _, name = path.rpartition(".")
    module = _MOVED.get(module, module)
    kind = None
    if module.split(".")[0] == "steerlens":
        try:
            kind = getattr(importlib.import_module(module), name, None)
        except ModuleNotFoundError:
            kind = None
    if not (isinstance(kind, type) and issubclass(kind, Part)):
        raise ValueError(f"the file uses {path}, which this steerlens lacks; pass your own classes as laws=[...]")
    return kind


#: Where files of format 2 look for classes that have moved since.
_MOVED = {
    "steerlens.laws": "steerlens.laws.feedback",
    "steerlens.setpoints": "steerlens.laws.setpoints",
    "steerlens.conditions": "steerlens.laws.conditions",
    "steerlens.fields": "steerlens.flow.fields",
    "steerlens.flows": "steerlens.flow.flows",
    "steerlens.sketch": "steerlens.flow.sketch",
}
