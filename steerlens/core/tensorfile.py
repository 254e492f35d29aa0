"""Files of named tensors and a header: safetensors, written as a whole or not at all, read as a whole and checked."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

#: Of the files that are written; those of format 2 are read.
FORMAT = 3
#: Keys of the safetensors metadata: the header as JSON, and a digest of it and of all tensors.
HEADER, DIGEST = "steerlens", "steerlens.digest"
#: Largest table of contents, in bytes; safetensors allows 100 MB.
LARGEST_TABLE = 32 * 2**20
#: A whole number beyond this is not exact as a double.
LARGEST_INT = 2**53
#: Seconds after which a temporary file belongs to a process that was killed.
ABANDONED_S = 24 * 3600.0

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def write(path: str | Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file: it is there complete, or the older file of this name is still there.

    The file gets the mode that the umask asks for; a symbolic link is followed.

    Args:
        header: Plain JSON; `format` is added.
        tensors: Detached ones, on any device.

    Raises:
        OSError: it cannot be written there. Nothing is left behind.
        TypeError, ValueError: the header holds what JSON does not, or a dtype has no name in safetensors.
    """
    text = json.dumps({"format": FORMAT, **header}, allow_nan=False)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    table: dict[str, Any] = {"__metadata__": {HEADER: text, DIGEST: digest(text, plain)}}
    end = 0
    # the widest first, so that every tensor begins at a multiple of its element size
    order = sorted(plain, key=lambda name: (-plain[name].element_size(), name))
    for name in order:
        tensor = plain[name]
        if tensor.dtype not in _NAMES:
            raise TypeError(f"{name} is a tensor of {tensor.dtype}, which a file cannot hold")
        begin, end = end, end + tensor.numel() * tensor.element_size()
        table[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    head = json.dumps(table).encode()
    head += b" " * (-len(head) % 8)
    if len(head) > LARGEST_TABLE:
        raise ValueError(f"the header takes {len(head)} bytes, a file holds {LARGEST_TABLE} at most")

    def pieces() -> Iterator[Any]:
        yield len(head).to_bytes(8, "little")
        yield head
        for name in order:
            yield _bytes(plain[name])

    write_whole(path, pieces())


def read(path: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a file, read as a whole: nothing refers to the file afterwards.

    Memory: the file's size, once. Nothing in it is executed.

    Args:
        kind: What the file should hold, `"controller"` for instance.

    Raises:
        OSError: it cannot be read.
        ValueError: not such a file, or one that was damaged or altered; the message names what was found.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        table, start = _table(file, size)
        metadata = table.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its metadata are not strings")
        text = metadata.get(HEADER)
        if text is None:
            text, held = _of_format_2(metadata, kind)
        else:
            held = parse_json(text, "its header")
        if not isinstance(held, dict):
            raise ValueError("its header is no JSON object")
        found = held.get("format")
        if found not in (2, FORMAT) or isinstance(found, bool):
            raise ValueError(f"it has format {found!r}, this version of steerlens reads formats 2 and {FORMAT}")
        if found == FORMAT and held.get("kind") != kind:
            raise ValueError(f"it holds a {held.get('kind')!r}, no {kind}")
        tensors = _tensors(file, table, start, size)
    if found == FORMAT and digest(text, tensors) != metadata.get(DIGEST):
        raise ValueError("its content is not what was saved (the digest differs): it was damaged or altered")
    return held, tensors


def _of_format_2(metadata: Mapping[str, str], kind: str) -> tuple[str, Any]:
    text = metadata.get(f"{HEADER}.{kind}")
    if text is None:
        raise ValueError(f"it has no steerlens header: it holds no {kind}")
    held = parse_json(text, "its header")
    return text, {**held, "format": 2} if isinstance(held, dict) else held


def parse_json(text: str, what: str) -> Any:
    """JSON of finite numbers.

    Raises:
        ValueError: no JSON, nested too deeply, a name twice in one object, half a character (a lone surrogate), or a
            number that is not finite or not exact.
    """

    def refuse(word: str) -> Any:
        raise ValueError(f"{what} holds the number {word[:40]}, which is not finite or too large")

    def whole(word: str) -> int:
        # long ones are refused before they are converted, which takes quadratic time
        return int(word) if len(word) < 20 and abs(int(word)) <= LARGEST_INT else refuse(word)

    def real(word: str) -> float:
        return float(word) if math.isfinite(float(word)) else refuse(word)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # readers differ in which of two values of one name they take
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError(f"{what} has a name twice")
        return found

    try:
        held = json.loads(text, parse_constant=refuse, parse_int=whole, parse_float=real, object_pairs_hook=once)
        if "\\ud" in text.lower():
            json.dumps(held, ensure_ascii=False).encode()
        return held
    except UnicodeEncodeError:
        raise ValueError(f"{what} holds half a character, which no text can contain") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} is no JSON ({error.msg})") from None
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply") from None


def check_fingerprint(model: Mapping[str, Any]) -> None:
    """Raises ValueError unless a model's fingerprint can be compared with that of another model."""
    probe = model.get("probe")
    numbers = isinstance(probe, list) and all(type(value) in (int, float) for value in probe)
    if probe is not None and not (numbers and len(probe) == 8):
        raise ValueError("its model's fingerprint has a probe that is no list of eight numbers")
    if not isinstance(model.get("name", ""), (str, type(None))):
        raise ValueError("its model's name is no text")
    for name in ("n_layers", "d_model", "n_heads", "d_vocab"):
        if type(model.get(name, 0)) is not int:
            raise ValueError(f"its model's {name} is no whole number")


def _table(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The table of contents, and where the tensors begin."""
    length = int.from_bytes(file.read(8), "little")
    if size < 10 or not 2 <= length <= min(size - 8, LARGEST_TABLE):
        raise ValueError("it is no safetensors file, or it was cut off")
    try:
        text = file.read(length).decode()
    except UnicodeDecodeError:
        raise ValueError("it is no safetensors file: its table of contents is no UTF-8") from None
    table = parse_json(text, "its table of contents")
    if not isinstance(table, dict):
        raise ValueError("it is no safetensors file: its table of contents is no JSON object")
    return table, 8 + length


def _tensors(file: BinaryIO, table: Mapping[str, Any], start: int, size: int) -> dict[str, Tensor]:
    """All tensors. Checked before anything is allocated: together they are exactly the rest of the file."""
    planned: list[tuple[str, torch.dtype, list[int]]] = []
    end = 0
    for begin, stop, name, kind, shape in sorted(_entry(name, entry) for name, entry in table.items()):
        if begin != end or math.prod(shape) * _DTYPES[kind].itemsize != stop - begin:
            raise ValueError(f"its tensor {name!r} does not fill its place in the file")
        planned.append((name, _DTYPES[kind], shape))
        end = stop
    if end != size - start:
        raise ValueError(f"its tensors take {end} bytes, the file has {size - start} for them: it was cut off")
    tensors = {}
    for name, dtype, shape in planned:
        tensor = torch.empty(shape, dtype=dtype)
        if tensor.numel() and file.readinto(_bytes(tensor)) != tensor.numel() * tensor.element_size():  # type: ignore[attr-defined]
            raise ValueError("it was cut off while it was read")
        if dtype == torch.bool and tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
            raise ValueError(f"its tensor {name!r} holds bytes that are neither true nor false")
        tensors[name] = tensor
    return tensors


def _entry(name: str, entry: Any) -> tuple[int, int, str, str, list[int]]:
    """Begin and end, name, dtype and shape of a tensor."""
    fields = ("data_offsets", "dtype", "shape")
    if not isinstance(entry, dict) or sorted(entry) != list(fields):
        raise ValueError(f"its tensor {name!r} is not described by dtype, shape and data_offsets")
    offsets, dtype, shape = (entry[field] for field in fields)
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"its tensor {name!r} has the unknown dtype {dtype!r}")
    for numbers, what in ((offsets, "data_offsets"), (shape, "shape")):
        legal = isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)
        if not legal or len(numbers) > 8 or max([1, *numbers]) > 2**48:
            raise ValueError(f"its tensor {name!r} has illegal {what}")
    # torch refuses a tensor whose strides overflow, also if it is empty
    if len(offsets) != 2 or math.prod(max(1, length) for length in shape) > 2**48:
        raise ValueError(f"its tensor {name!r} has an illegal shape or illegal data_offsets")
    return *offsets, name, dtype, shape


def digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the header and of every tensor's name, dtype, shape and bytes."""
    hashed = hashlib.sha256(text.encode(errors="surrogatepass"))
    for name, tensor in sorted(tensors.items()):
        hashed.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        hashed.update(_bytes(tensor))
    return f"sha256:{hashed.hexdigest()}"


def _bytes(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's own memory."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else bytearray()
    return memoryview(array)


def write_whole(path: str | Path, pieces: Iterable[Any]) -> None:
    """Write bytes to a temporary file, then replace the file: it is there complete, or as it was before.

    Raises:
        OSError: it cannot be written there. Nothing is left behind.
    """
    target = Path(os.path.realpath(path))  # a link stays a link
    if target.exists() and not target.is_file():
        raise OSError(f"{path} exists and is no regular file")
    stem = f".{target.name[:80]}."
    for left in target.parent.glob(f"{_literal(stem)}*.part"):
        with suppress(FileNotFoundError):  # another process removes the same one
            if time.time() - left.stat().st_mtime > ABANDONED_S:
                left.unlink()
    part = target.with_name(f"{stem}{secrets.token_hex(6)}.part")
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    except OSError as error:
        # the file that was asked for, not the temporary one beside it
        raise type(error)(error.errno, error.strerror, str(path)) from None
    try:
        with open(descriptor, "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(descriptor)
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _literal(text: str) -> str:
    """A file name as a pattern that matches nothing else."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in text)
