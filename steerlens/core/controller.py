"""What every method returns: loops and where they came from, as data that composes, scales, saves and loads."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerlens.core.law import Loop, Part, map_tensors, tensors_of
from steerlens.core.positions import check_where
from steerlens.core.sites import Site

FORMAT = 1


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

    def __add__(self, other: Controller) -> Controller:
        if not isinstance(other, Controller):
            return NotImplemented
        # what a controller's loops remember stays its own
        offset = max((loop.group for loop in self.loops), default=-1) + 1
        moved = tuple(loop.replace(group=loop.group + offset) for loop in other.loops)
        model = self.recipe.get("model") or other.recipe.get("model")
        return Controller(self.loops + moved, {"method": "+", "parts": [self.recipe, other.recipe], "model": model})

    def __mul__(self, factor: float) -> Controller:
        return self._each(lambda loop: loop.replace(strength=loop.strength * float(factor)))

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

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

        return self._each(lambda loop: loop.replace(law=map_tensors(loop.law, move)))

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
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of([loop.law for loop in self.loops]))

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

        tensors: dict[str, Tensor] = {}
        loops = [_pack_loop(loop, f"loops.{index}", tensors) for index, loop in enumerate(self.loops)]
        header = {"format": FORMAT, "recipe": self.recipe, "loops": loops}
        save_file(tensors, str(path), metadata={"steerlens": json.dumps(header)})

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
        if header["format"] > FORMAT:
            raise ValueError(f"{path} has format {header['format']}, this version of steerlens reads up to {FORMAT}")
        known = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in laws}
        return cls([_unpack_loop(entry, tensors, known) for entry in header["loops"]], header["recipe"])

    def _each(self, change: Any) -> Controller:
        return Controller([change(loop) for loop in self.loops], self.recipe)


def _ranges(layers: list[int]) -> str:
    if layers and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])
    return ", ".join(map(str, layers)) or "none"


def _pack_loop(loop: Loop, key: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    where = loop.where
    if isinstance(where, slice):
        packed: Any = {"slice": [where.start, where.stop]}
    elif isinstance(where, str):
        packed = where
    elif isinstance(where, Tensor):
        packed = _pack(where, f"{key}.where", tensors)
    else:
        raise TypeError(f"where={where!r} is a callable, which a file cannot hold; use .at() with a slice or a mask")
    return {
        "law": _pack(loop.law, f"{key}.law", tensors),
        "act": str(loop.act),
        "sense": str(loop.sense),
        "where": packed,
        "strength": loop.strength,
        "name": loop.name,
        "group": loop.group,
    }


def _unpack_loop(entry: dict[str, Any], tensors: dict[str, Tensor], known: dict[str, type[Part]]) -> Loop:
    where = entry["where"]
    if isinstance(where, dict):
        where = slice(*where["slice"]) if "slice" in where else _unpack(where, tensors, known)
    return Loop(
        _unpack(entry["law"], tensors, known),
        Site.parse(entry["act"]),
        Site.parse(entry["sense"]),
        where=where,
        strength=entry["strength"],
        name=entry["name"],
        group=entry["group"],
    )


def _pack(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[key] = value.detach().contiguous().clone()
        return {"tensor": key}
    if isinstance(value, Part):
        state = {name: _pack(entry, f"{key}.{name}", tensors) for name, entry in vars(value).items()}
        return {"class": f"{type(value).__module__}.{type(value).__qualname__}", "state": state}
    if isinstance(value, (list, tuple)):
        return {"list": [_pack(entry, f"{key}.{index}", tensors) for index, entry in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise TypeError(f"{key} is a {type(value).__name__}; a law holds tensors, numbers, strings, lists and parts only")


def _unpack(entry: dict[str, Any], tensors: dict[str, Tensor], known: dict[str, type[Part]]) -> Any:
    if "tensor" in entry:
        return tensors[entry["tensor"]]
    if "list" in entry:
        return [_unpack(item, tensors, known) for item in entry["list"]]
    if "value" in entry:
        return entry["value"]
    kind = known.get(entry["class"]) or _own_class(entry["class"])
    part = object.__new__(kind)
    part.__dict__.update({name: _unpack(item, tensors, known) for name, item in entry["state"].items()})
    return part


def _own_class(path: str) -> type[Part]:
    """A part defined in steerlens; nothing outside the package is imported for a file."""
    module, _, name = path.rpartition(".")
    kind = None
    if module.split(".")[0] == "steerlens":
        try:
            kind = getattr(importlib.import_module(module), name, None)
        except ModuleNotFoundError:
            kind = None
    if not (isinstance(kind, type) and issubclass(kind, Part)):
        raise ValueError(f"the file uses {path}, which this steerlens lacks; pass your own classes as laws=[...]")
    return kind
