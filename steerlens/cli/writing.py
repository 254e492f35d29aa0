"""Where a command writes: checked before it begins, and written as a whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from steerlens.core.tensorfile import write_whole


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
