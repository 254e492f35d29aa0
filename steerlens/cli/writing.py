"""Where a command writes: checked before it begins, and written as a whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from steerlens.cli.formats import ENDINGS
from steerlens.core.tensorfile import HEADER, write_whole


def check_writable(path: Path) -> None:
    """Raises OSError, before anything slow is done, if a file cannot be written there."""
    folder = path.parent
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder} to write {path.name} in; make it first: mkdir -p {folder}"
        )
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it: {path / 'controller.safetensors'}")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise PermissionError(f"{path} cannot be written: permission denied")


def check_controller_path(path: Path) -> None:
    """As `check_writable`, for a controller: raises ValueError if something else is there, such as the pairs.

    A name that ends as another program's file does is refused too: `steerlens convert` writes those.
    """
    check_writable(path)
    kind = ENDINGS.get(path.suffix.lower(), "steerlens")
    if kind != "steerlens":
        raise ValueError(
            f"{path} would not hold what its name says: a controller's file ends in .safetensors; steerlens convert "
            f"writes the format {kind}"
        )
    if path.is_file() and path.stat().st_size and not _is_ours(path):
        raise ValueError(f"{path} is there and holds no controller; remove it first, or name another file")


def _is_ours(path: Path) -> bool:
    """Whether a file is a safetensors file with a header of ours, so that no model's weights are replaced."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return size < path.stat().st_size and HEADER.encode() in file.read(size)


def write_text(path: Path, text: str) -> None:
    """Write a text file, UTF-8: it is there complete, or the older one still is."""
    write_whole(path, [text.encode("utf-8")])


def text_between(path: Path, start: str, end: str) -> tuple[str, str]:
    """What stands before and behind two markers in a file, markers included.

    Raises:
        ValueError: the file lacks a marker.
    """
    text = path.read_text(encoding="utf-8")
    if start not in text or end not in text:
        raise ValueError(f"{path} lacks the markers {start} and {end}")
    before, rest = text.split(start, 1)
    return before + start, end + rest.split(end, 1)[1]
