"""GGUF files of small float tensors, read and written without trusting them."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from steerlens.core.tensorfile import write_whole

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
#: Limits of what is read: bytes before the tensors, number of keys and of tensors, and numbers in an array.
LARGEST_HEAD, MOST_ENTRIES, MOST_ITEMS = 16 * 2**20, 10_000, 1_000_000
#: Type numbers of scalar values, as `struct` names them.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
#: Type numbers of tensors that are no quantisation.
_DTYPES = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}


def read_gguf(path: str | Path, architecture: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Keys and tensors of a GGUF file of an architecture; nothing refers to the file afterwards.

    Memory: that of the tensors, which is at most the file's size, and the keys; all sizes are checked before anything
    is allocated. The package gguf does not bound what it reads: a file of 100 bytes can keep it busy for ever.

    Args:
        architecture: What `general.architecture` has to be, such as `"controlvector"`.

    Raises:
        OSError: it cannot be read.
        ValueError: no such file, another architecture, or damaged; the message names what was found.
    """
    with open(path, "rb") as file:
        head = _Head(file, os.fstat(file.fileno()).st_size)
        keys, table, start = _contents(head)
        found = keys.get("general.architecture")
        if found != architecture:
            raise ValueError(f"its architecture is {str(found)[:60]!r}, not {architecture!r}")
        return keys, _tensors(file, table, start, head.size)


def write_gguf(path: str | Path, keys: Mapping[str, str | int], tensors: Mapping[str, Tensor]) -> None:
    """Write a GGUF file of version 3: it is there complete, or the older file of this name is still there.

    Args:
        keys: Texts, and numbers that fit 32 bits without a sign; `general.architecture` is the first.
        tensors: Of one dimension; written in float32.

    Raises:
        OSError: it cannot be written there. Nothing is left behind.
    """
    head = MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(keys))
    for key, value in keys.items():
        head += _text(key)
        head += struct.pack("<I", _STRING) + _text(value) if isinstance(value, str) else struct.pack("<II", 4, value)
    offset, bodies = 0, []
    for name, tensor in tensors.items():
        data = tensor.detach().cpu().float().contiguous().numpy().astype("<f4").tobytes()
        head += _text(name) + struct.pack("<IQIQ", 1, tensor.numel(), 0, offset)
        bodies.append(data + b"\0" * (-len(data) % ALIGNMENT))
        offset += len(bodies[-1])
    write_whole(path, [head + b"\0" * (-len(head) % ALIGNMENT), *bodies])


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


class _Head:
    """Bytes in order, none beyond the end of the file or of what a head may take."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size, self.place = file, size, 0

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if not 0 <= count <= min(self.size, LARGEST_HEAD) - self.place:
            raise ValueError("it was cut off, or its head is too large for a file of vectors")
        self.place += count
        return self.file.read(count)

    def number(self, form: str) -> Any:
        """The next scalar."""
        (value,) = struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))
        return value

    def text(self) -> str:
        """The next string."""
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError:
            raise ValueError("it has a name that is no UTF-8") from None

    def value(self, kind: int) -> Any:
        """The next value of a type; of an array, its numbers or strings."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"it has a value of the unknown type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if kind == _ARRAY or count > MOST_ITEMS:
            raise ValueError("it has an array that is nested, or too long for a file of vectors")
        return [self.value(kind) for _ in range(count)]


def _contents(head: _Head) -> tuple[dict[str, Any], list[tuple[str, torch.dtype, list[int], int]], int]:
    """Keys, the tensors' names, dtypes, shapes and offsets, and where the tensors begin."""
    if head.size < 24 or head.take(4) != MAGIC:
        raise ValueError("it is no GGUF file, or it was cut off")
    version = head.number("I")
    if version not in (2, VERSION):
        raise ValueError(f"it is GGUF of version {version} (or of the other byte order); versions 2 and 3 are read")
    counts = head.number("Q"), head.number("Q")
    if max(counts) > MOST_ENTRIES:
        raise ValueError(f"it has {counts[0]} tensors and {counts[1]} keys, too many for a file of vectors")
    keys: dict[str, Any] = {}
    for _ in range(counts[1]):
        name = head.text()
        if name in keys:
            raise ValueError(f"it has the key {name[:60]!r} twice")
        keys[name] = head.value(head.number("I"))
    table = [_entry(head) for _ in range(counts[0])]
    names = [name for name, *_ in table]
    if len(set(names)) < len(names):
        raise ValueError("it has two tensors of one name")
    alignment = keys.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= 2**16:
        raise ValueError(f"it has the alignment {str(alignment)[:20]}")
    return keys, table, -(-head.place // alignment) * alignment


def _entry(head: _Head) -> tuple[str, torch.dtype, list[int], int]:
    name, n_dims = head.text(), head.number("I")
    if n_dims > 4:
        raise ValueError(f"its tensor {name[:60]!r} has {n_dims} dimensions")
    # the fastest dimension comes first
    shape = [head.number("Q") for _ in range(n_dims)][::-1]
    kind, offset = head.number("I"), head.number("Q")
    if kind not in _DTYPES:
        raise ValueError(f"its tensor {name[:60]!r} is quantised, or of the unknown type {kind}; give 32-bit floats")
    return name, _DTYPES[kind], shape, offset


def _tensors(
    file: BinaryIO, table: list[tuple[str, torch.dtype, list[int], int]], start: int, size: int
) -> dict[str, Tensor]:
    """All tensors, each in a place of its own."""
    places = []
    for name, dtype, shape, offset in table:
        # of a few large numbers the product is exact in Python, however large
        count = math.prod(shape)
        end = start + offset + count * dtype.itemsize
        if count > size or end > size:
            raise ValueError(f"its tensor {name[:60]!r} reaches beyond the end of the file: it was cut off")
        places.append((start + offset, end, name, dtype, shape))
    places.sort(key=lambda place: place[:2])
    if any(first[1] > second[0] for first, second in pairwise(places)):
        raise ValueError("two of its tensors are in one place")
    found = {}
    for begin, end, name, dtype, shape in places:
        file.seek(begin)
        data = bytearray(file.read(end - begin))
        if len(data) != end - begin:
            raise ValueError("it was cut off while it was read")
        found[name] = (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).reshape(shape)
    return found
