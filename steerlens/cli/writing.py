"""Where a command writes: checked before it begins."""

from __future__ import annotations

import os
from pathlib import Path


def check_writable(path: Path) -> None:
    """Raises OSError, before anything slow is done, if a file cannot be written there."""
    folder = path.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} to write {path.name} in; make it first: mkdir -p {folder}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it: {path / 'controller.safetensors'}")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise PermissionError(f"{path} cannot be written: permission denied")
