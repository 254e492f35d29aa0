"""A record in other forms: one long table, and a signal by its short name and layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from steerlens.core.sites import POINTS

#: What keeps a second run's names apart.
_RUN = re.compile(r"^run\d+_")
#: What needs another part of steerlens, such as a plot of a record, by name; that part registers it here.
VIEWS: dict[str, Callable[..., Any]] = {}


def find(record: Mapping[str, Tensor], name: Any) -> str:
    """The full name of a signal: itself, or `("steer_error", 12)` and `("error", 12)` as an `ActivationCache` has it.

    Raises:
        KeyError: there is none; the message lists those that there are.
    """
    if isinstance(name, tuple) and len(name) == 2 and isinstance(name[0], str) and hasattr(name[1], "__index__"):
        signal, layer = name
        full = f"blocks.{int(layer)}.hook_steer_{signal.removeprefix('hook_').removeprefix('steer_')}"
    else:
        full = name
    if isinstance(full, str) and full in list(record):
        return full
    raise KeyError(f"no signal {name!r} was recorded; {described(record)}")


def described(record: Mapping[str, Tensor]) -> str:
    """What a record holds, in a few words."""
    layers: dict[str, list[int]] = {}
    for full in record:
        layer, signal = parts_of(full)
        layers.setdefault(signal, []).append(layer)
    words = [
        f"{signal} at layer{'s' * (len(set(where)) != 1)} {_ranges(sorted(where))}" for signal, where in layers.items()
    ]
    return f"the record holds {'; '.join(words[:12])}{'; ...' if len(words) > 12 else ''}" if words else "it is empty"


def parts_of(full: str) -> tuple[int, str]:
    """Layer and signal of a hook name: `blocks.5.hook_steer_u_norm` is `(5, "u_norm")`."""
    head, _, signal = full.partition(".hook_steer_")
    return int(head.removeprefix("blocks.")), signal


def by_place(record: Mapping[str, Tensor], signal: str) -> dict[tuple[int, str], str]:
    """Full names of one signal by layer and point; the point is empty where a layer has one site.

    Where several loops act at one site it is their total, if the signal has one.
    """
    found = {}
    for full in record:
        layer, tail = parts_of(full)
        plain = _RUN.sub("", tail)
        point = next((point for point in POINTS if plain == f"{point}_{signal}"), None)
        if plain == signal or tail == signal:
            found[layer, ""] = full
        elif point is not None:
            found[layer, point] = full
    order = ("", *POINTS)
    return dict(sorted(found.items(), key=lambda entry: (entry[0][0], order.index(entry[0][1]))))


def _ranges(layers: list[int]) -> str:
    if len(layers) > 2 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ", ".join(map(str, layers))


def frame(record: Mapping[str, Tensor]) -> Any:
    """One line for each number, see `Record.frame`."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError("a table of the record needs pandas; pip install 'steerlens[plots]'") from error
    columns: dict[str, list[Any]] = {"row": [], "token": [], "layer": [], "signal": [], "value": []}
    for full in record:
        layer, signal = parts_of(full)
        value = record[full].detach()
        if value.ndim != 2:  # a control [batch pos d] is a tensor's business
            continue
        rows, tokens = value.shape
        columns["row"] += [row for row in range(rows) for _ in range(tokens)]
        columns["token"] += list(range(tokens)) * rows
        columns["layer"] += [layer] * value.numel()
        columns["signal"] += [signal] * value.numel()
        columns["value"] += value.double().flatten().tolist()
    found = pandas.DataFrame(columns)
    return found.sort_values(["row", "token", "layer", "signal"], kind="stable", ignore_index=True)
