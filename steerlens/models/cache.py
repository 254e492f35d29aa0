"""The folder of converted models: made whole or not at all, verified when it is read, cleaned of what was left over."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Of an unfinished conversion's folder.
PARTIAL = "partial-"
#: Seconds after which it belongs to a process that was killed; a conversion takes about one minute.
ABANDONED_S = 3600.0
#: Names and sizes of a model's files, and the hashes of the small ones.
MANIFEST = "steerlens.json"
SMALL = 16 * 2**20


def cache_folder() -> Path:
    """Where converted models are kept: `$STEERLENS_CACHE`, or `steerlens` in the user's cache folder."""
    if os.environ.get("STEERLENS_CACHE"):
        return Path(os.environ["STEERLENS_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "steerlens"


@contextmanager
def making(cache: Path) -> Iterator[Path]:
    """A folder in the cache for an unfinished model; it is removed at the end, and so are those of killed processes.

    Raises:
        OSError: the cache cannot be written; the message names it and how to choose another one.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for left in cache.glob(f"{PARTIAL}*"):
            if time.time() - left.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(left, ignore_errors=True)
        work = Path(tempfile.mkdtemp(dir=cache, prefix=PARTIAL))
    except OSError as error:
        why = error.strerror or error
        raise OSError(f"the cache folder {cache} cannot be written ({why}); set STEERLENS_CACHE to another") from error
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def seal(folder: Path) -> None:
    """Note what a finished model consists of, for `verify`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    noted = {str(path.relative_to(folder)): [path.stat().st_size, _hash(path)] for path in files}
    (folder / MANIFEST).write_text(json.dumps(noted, indent=1), encoding="utf-8")


def verify(folder: Path) -> None:
    """Raises OSError if a converted model's files are not those that were written; without a manifest, if two lack."""
    manifest = folder / MANIFEST
    try:
        # older versions wrote none
        noted = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
        faults = [_fault(folder / name, size, digest) for name, (size, digest) in noted.items()]
    except (ValueError, TypeError, AttributeError):
        faults = [f"{MANIFEST} cannot be read"]
    faults += [f"{name} is missing" for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    wrong = next(filter(None, faults), None)
    if wrong:
        raise OSError(f"the converted model in {folder} is damaged: {wrong}. Delete the folder; it is made anew then")


def _fault(path: Path, size: int, digest: str | None) -> str:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != size:
        return f"{path.name} has {path.stat().st_size} bytes, not {size}"
    return f"{path.name} was changed" if digest != _hash(path) else ""


def _hash(path: Path) -> str | None:
    """SHA-256 of a small file. The weights are half a gigabyte: their size is what a full disk or a kill changes."""
    if path.stat().st_size > SMALL:
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
