"""Provenance of a controller: the call that made it, as plain JSON."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from steerlens.core import Site
from steerlens.fit.contrast import Pairs
from steerlens.fit.goal import Goal
from steerlens.hosts import Host
from steerlens.version import __version__

#: Arrays of at most this many numbers are written out; of larger ones the recipe keeps shape, dtype and a hash.
WRITTEN_OUT = 64


def recipe(
    method: str, host: Host, arguments: Mapping[str, Any], *, found: Mapping[str, Any] | None = None, data: Any = None
) -> dict[str, Any]:
    """The recipe of a controller, whatever the arguments are.

    Args:
        method: Name of the method.
        host: Of the model.
        arguments: What was asked.
        found: What fitting found, such as a threshold.
        data: What it was fitted on.
    """
    return {
        "method": method,
        "steerlens": __version__,
        "arguments": plain(arguments),
        "found": plain(found or {}),
        "model": host.fingerprint(),
        "data": digest(data),
    }


def digest(data: Any) -> Any:
    """A hash of texts or of a goal; for a list of `Pairs` or goals a list of hashes, and None for no data."""
    if data is None:
        return None
    if isinstance(data, (Pairs, Goal)):
        return data.digest()
    if isinstance(data, (list, tuple)) and any(isinstance(each, (Pairs, Goal)) for each in data):
        return [digest(each) for each in data]
    return _sha256(json.dumps(plain(data), sort_keys=True).encode())


def plain(value: Any) -> Any:
    """A value as JSON can hold it.

    Numbers, strings, sequences and mappings stay what they are, also those of numpy and torch. A large array becomes
    its shape, dtype and hash; a slice `{"slice": [start, stop, step]}`; a site its hook name; `Pairs` their hash; any
    other object its short repr if that is the same in every process, else the name of its class. A number that is not
    finite becomes a string.
    """
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Site):
        return str(value)
    if isinstance(value, Pairs):
        return {"pairs": value.digest()}
    if isinstance(value, slice):
        return {"slice": [plain(part) for part in (value.start, value.stop, value.step)]}
    if hasattr(value, "tolist") and hasattr(value, "shape"):
        return plain(value.tolist()) if math.prod(value.shape) <= WRITTEN_OUT else _array(torch.as_tensor(value))
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((plain(entry) for entry in value), key=str)
    if isinstance(value, (list, tuple, range)):
        return [plain(entry) for entry in value]
    return _describe(value)


def _array(tensor: Tensor) -> dict[str, Any]:
    data = tensor.detach().cpu().contiguous()
    return {
        "shape": list(data.shape),
        "dtype": str(data.dtype).removeprefix("torch."),
        "sha256": _sha256(data.flatten().view(torch.uint8).numpy().tobytes()),
    }


def _describe(value: Any) -> str:
    name = getattr(value, "__name__", None)
    if callable(value) and isinstance(name, str):
        return name
    words = type(value).__qualname__
    # a module's repr is its whole tree, that of an iterator would use it up, and an address is new in every process
    if not isinstance(value, (nn.Module, Host, Iterable)):
        words = repr(value)
    return words if len(words) <= 200 and " at 0x" not in words else type(value).__qualname__


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
