"""A file that holds an evaluation as it goes on: its protocol first, then one line a measurement."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from steerlens.core import Controller, tensors_of
from steerlens.hosts import Host
from steerlens.version import __version__

#: Of the files.
FORMAT = 2
_PACKAGES = ("torch", "transformers", "transformer_lens", "nnsight")


class Log:
    """Measurements by key, on disk if a path is given.

    A file that exists is gone on with: what it holds is not measured again. Its last line may be cut off, as by a kill.

    Args:
        path: JSON lines; None keeps them in memory only.
        protocol: What the numbers depend on, as plain JSON.

    Raises:
        ValueError: the file is no such file, or was written under another protocol; the message names the differences.
    """

    def __init__(self, path: str | Path | None, protocol: Mapping[str, Any]):
        self.protocol = json.loads(json.dumps(protocol))
        self.path = None if path is None else Path(path)
        self._held: dict[str, Any] = {}
        if self.path is None:
            return
        head = _line({"steerlens evaluation": FORMAT, "protocol": self.protocol})
        # a kill may have come while the first line was written
        if not self.path.exists() or head.startswith(self.path.read_text(encoding="utf-8")):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(head, encoding="utf-8")
        else:
            self._resume(self.path)

    def __contains__(self, key: Any) -> bool:
        return json.dumps(key) in self._held

    def __getitem__(self, key: Any) -> Any:
        return self._held[json.dumps(key)]

    def put(self, key: Any, value: Any) -> Any:
        """Keep a value, and return it as a file gives it back."""
        line = json.dumps({"key": key, "value": value})
        self._write(json.loads(line))
        self._held[json.dumps(key)] = json.loads(line)["value"]
        return self._held[json.dumps(key)]

    def _write(self, line: Any) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(line))

    def _resume(self, path: Path) -> None:
        whole, _, cut = path.read_text(encoding="utf-8").rpartition("\n")
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            ours = "protocol" in lines[0]
        except (ValueError, IndexError, TypeError):
            ours = False
        if not ours:
            raise ValueError(f"{path} is no evaluation of steerlens; name another file, or remove it")
        if lines[0]["steerlens evaluation"] != FORMAT:
            raise ValueError(f"{path} has format {lines[0]['steerlens evaluation']}, this version reads {FORMAT}")
        differences = list(_differences(lines[0]["protocol"], self.protocol, ""))
        if differences:
            raise ValueError(
                f"{path} was written under another protocol: {'; '.join(differences[:6])}. Name another file, or "
                "repeat the run as it was"
            )
        if cut:
            with path.open("r+b") as file:
                file.truncate(len(whole.encode()) + 1)
        self._held = {json.dumps(line["key"]): line["value"] for line in lines[1:]}


def _line(value: Any) -> str:
    return json.dumps(value) + "\n"


def _differences(was: Any, now: Any, place: str) -> Iterator[str]:
    if isinstance(was, dict) and isinstance(now, dict):
        for key in [*was, *(key for key in now if key not in was)]:
            yield from _differences(was.get(key), now.get(key), f"{place}.{key}" if place else str(key))
    elif was != now:
        yield f"{place} is {_short(now)}, it was {_short(was)}"


def _short(value: Any) -> str:
    words = json.dumps(value)
    return words if len(words) <= 60 else words[:57] + "..."


def versions() -> dict[str, str]:
    """Of steerlens and the libraries that compute the numbers."""
    found = {"steerlens": __version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def setting(host: Host) -> dict[str, Any]:
    """What numbers depend on besides the data: versions, the model, its dtype and device."""
    return {
        "versions": versions(),
        "model": {"class": type(host.model).__name__, **host.fingerprint()},
        "dtype": str(host.dtype).removeprefix("torch."),
        "device": host.device.type,
        "threads": torch.get_num_threads() if host.device.type == "cpu" else None,
    }


def identity(controller: Controller) -> dict[str, Any]:
    """What distinguishes two controllers: a hash of their loops and tensors, and where they act."""
    found = hashlib.sha256()
    for loop in controller.loops:
        where = loop.where if isinstance(loop.where, (str, slice)) else type(loop.where).__name__
        found.update(f"{type(loop.law).__name__} {loop.act} {loop.sense} {where} {loop.strength}".encode())
        # one tensor at a time: loops may share a direction of the size of the model
        for tensor in tensors_of(loop.parts):
            found.update(save({"": tensor.detach().cpu().contiguous()}))
    return {
        "method": controller.recipe.get("method"),
        "digest": found.hexdigest()[:16],
        "where": sorted(
            {str(loop.where) if isinstance(loop.where, (str, slice)) else "given" for loop in controller.loops}
        ),
        "data": controller.recipe.get("data"),
    }


def digest(items: Any) -> str:
    """A hash of plain data."""
    plain = json.dumps(items, sort_keys=True, default=_plain)
    return hashlib.sha256(plain.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else repr(value)
