"""What a controller is made of: objects that are moved, saved and sent by walking their attributes."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor


class Part:
    """Base class of what a controller is made of: objects whose attributes are tensors, plain values, lists or parts.

    Parts are moved, saved, loaded and sent to a server by walking their attributes (`map_tensors`), so a part needs no
    code of its own for that, and may hold nothing else. Files hold the attributes that the constructor assigns, or that
    the class body annotates, and only with values of the annotated type (`gain: float`, there or in the constructor).

    Attributes:
        unbounded: Names of attributes in which infinity has a meaning; in all others it is refused, and NaN in all.
    """

    unbounded: ClassVar[tuple[str, ...]] = ()

    def validate(self) -> None:
        """Raises ValueError for values that the part cannot compute with; called for every part that a file brings."""

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={_shown(value)}" for name, value in vars(self).items())
        return f"{type(self).__name__}({shown})"


def _shown(value: Any) -> str:
    """A value in a repr: a tensor's shape, or a single number."""
    if isinstance(value, Tensor):
        if value.ndim or value.is_meta:
            return f"[{' '.join(map(str, value.shape))}]"
        return f"{value.item():.4g}"
    if isinstance(value, (list, tuple)):
        shown = [_shown(entry) for entry in value[:3]] + ["..."] * (len(value) > 3)
        inner = ", ".join(shown) + ("," if isinstance(value, tuple) and len(value) == 1 else "")
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    return repr(value)


def map_tensors(value: Any, change: Any) -> Any:
    """A copy of a part, list, tuple or dict with `change` applied to every tensor in it; other values are shared."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Part):
        copy = object.__new__(type(value))
        copy.__dict__.update({name: map_tensors(entry, change) for name, entry in value.__dict__.items()})
        return copy
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(entry, change) for entry in value)
    if isinstance(value, dict):
        return {name: map_tensors(entry, change) for name, entry in value.items()}
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in a part, list, tuple or dict, in a fixed order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(value, note)
    return found
