"""Files of `torch.save`, read so that nothing in them runs and nothing large is allocated."""

from __future__ import annotations

import io
import os
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from steerlens.core.tensorfile import write_whole

#: How a zip archive begins, which is what torch.save writes.
_BEGIN = b"PK\x03\x04"
#: Largest list of instructions in such a file, in bytes, and how many values it may make.
LARGEST_PICKLE, MOST_STEPS = 4 * 2**20, 400_000
#: Instructions that make plain values and tensors; the few names that they may look up.
_STEPS = frozenset(
    [
        "PROTO",
        "FRAME",
        "STOP",
        "MARK",
        "POP",
        "POP_MARK",
        "DUP",
        "MEMOIZE",
        "PUT",
        "BINPUT",
        "LONG_BINPUT",
        "GET",
        "BINGET",
        "LONG_BINGET",
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
        "BINFLOAT",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "EMPTY_DICT",
        "EMPTY_LIST",
        "EMPTY_TUPLE",
        "DICT",
        "LIST",
        "TUPLE",
        "TUPLE1",
        "TUPLE2",
        "TUPLE3",
        "APPEND",
        "APPENDS",
        "SETITEM",
        "SETITEMS",
        "GLOBAL",
        "REDUCE",
        "BINPERSID",
    ]
)
_TENSOR = ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "collections OrderedDict")
_STORAGES = ("Float", "Double", "Half", "BFloat16", "Int", "Long", "Short", "Char", "Byte", "Bool")
_NAMES = frozenset((*_TENSOR, *(f"torch {kind}Storage" for kind in _STORAGES)))


#: Tensors and plain values, in dictionaries, lists and tuples.
Held: TypeAlias = Any


def read_torch(path: str | Path) -> Held:
    """Tensors and plain values from a file that `torch.save` wrote, in dictionaries, lists and tuples.

    Such a file is a pickle, a program that runs when it is read. Here its instructions are looked at first, and only
    those that make plain values and dense tensors are allowed; it then goes to `torch.load(weights_only=True)`. Files
    that hold objects of a library's classes are refused.

    Memory: about the file's size, twice.

    Args:
        path: The file.

    Raises:
        OSError: no such file, or it cannot be read.
        ValueError: anything else: an older format, one that holds objects, a damaged one.
    """
    with open(path, "rb") as file:
        data = file.read(len(_BEGIN))
        # nothing else is read as a whole; a device has no size, and no end
        if data == _BEGIN:
            data += file.read(os.fstat(file.fileno()).st_size - len(_BEGIN))
    try:
        _check(data)
        try:
            found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged file provokes in a reader that is not ours
            raise ValueError(f"PyTorch cannot read it ({type(error).__name__})") from None
        return _Plain(len(data)).of(found, 0)
    except ValueError as error:
        raise ValueError(f"{path} was not loaded: {error}") from None


def write_torch(path: str | Path, held: Any) -> None:
    """Write tensors and plain values with `torch.save`: complete, or the older file is still there.

    Raises:
        OSError: it cannot be written there.
    """
    buffer = io.BytesIO()
    torch.save(held, buffer)
    write_whole(path, [buffer.getbuffer()])


def _check(data: bytes) -> None:
    """Raises ValueError unless the file is an archive of tensors with a list of harmless instructions."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            # a compressed entry could be a thousand times as large as the file, and so could entries of the same bytes
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("its archive is compressed, unlike those of PyTorch")
            claimed = sum(entry.file_size for entry in entries)
            if claimed > len(data):
                raise ValueError(f"its archive claims {claimed} bytes in a file of {len(data)}")
            programs = [entry for entry in entries if entry.filename.rpartition("/")[2].endswith(".pkl")]
            if len(programs) != 1 or programs[0].file_size > LARGEST_PICKLE or len(entries) > 10_000:
                raise ValueError("it is no archive of tensors that torch.save wrote")
            program = archive.read(programs[0])
    except ValueError:
        raise
    except Exception as error:  # zipfile has no list of what a damaged archive provokes
        raise ValueError(
            f"it is no archive that torch.save wrote ({type(error).__name__}); a bare pickle is not read, because it "
            "can run any code"
        ) from None
    _check_program(program)


def _check_program(program: bytes) -> None:
    count = 0
    try:
        for step, argument, _ in pickletools.genops(program):
            count += 1
            if step.name == "GLOBAL" and argument not in _NAMES:
                raise _RefusedError(
                    f"it holds a {str(argument).replace(' ', '.')[:80]}, which is no tensor and no plain value"
                )
            if step.name not in _STEPS:
                raise _RefusedError(f"it has the instruction {step.name}, which no tensor or plain value needs")
            if count > MOST_STEPS or ("PUT" in step.name and int(argument or 0) > MOST_STEPS):
                raise _RefusedError(f"it has more than {MOST_STEPS} values")
    except _RefusedError as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # genops has no list of what a damaged program provokes
        raise ValueError(f"its list of instructions is damaged ({type(error).__name__})") from None


class _RefusedError(Exception):
    """Apart from the errors of the scanner."""


class _Plain:
    """Plain values, if all tensors are dense and no larger than the file, whose size in bytes it is given."""

    def __init__(self, size: int):
        self._size = size
        self._count = 0

    def of(self, value: Any, depth: int) -> Any:
        """The value without what torch.load has made around it."""
        # a list that holds another one twice, which does the same, doubles with every instruction
        self._count += 1
        if depth > 32 or self._count > MOST_STEPS:
            raise ValueError("it is nested too deeply" if depth > 32 else f"it has more than {MOST_STEPS} values")
        if isinstance(value, Tensor):
            large = value.numel() * value.element_size() > self._size
            # a tensor with strides of zero claims any size
            if value.layout != torch.strided or value.device.type != "cpu" or large:
                raise ValueError(f"it holds a tensor of shape {list(value.shape)[:8]} that the file has no place for")
            return value.detach()
        if isinstance(value, Mapping):
            return {self.of(key, depth + 1): self.of(entry, depth + 1) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.of(entry, depth + 1) for entry in value)
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise ValueError(f"it holds a {type(value).__name__}, which is no tensor and no plain value")
