"""Texts that come with steerlens, written for it and free to use: contrast pairs, neutral sentences and prompts."""

from __future__ import annotations

import json
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from steerlens.fit.contrast import Pairs, Read

#: Each set is cut in two: fit and choose on one half, report on the other.
SPLITS = ("dev", "held_out")


def shipped(name: str, *, split: str | None = None, read: Read = "last", prepend_bos: bool | None = None) -> Pairs:
    """Contrast pairs that come with steerlens: `shipped("sentiment", split="dev")`.

    At least forty pairs each of sentiment, formality, certainty and compliance, as prompt and completion, and of four
    concepts, as sentences: anger, french, ocean, wedding. `steerlens/data/README.md` describes them.

    Args:
        name: Of the set.
        split: `"dev"` or `"held_out"`, two halves that share no text; None: both, dev first.
        read: As in `Pairs`; `"completion"` only for sets with completions.
        prepend_bos: As in `Pairs`.

    Raises:
        ValueError: an unknown name or split; the message lists the known ones.
    """
    rows = _rows(resources.files("steerlens") / "data", name, split, "pairs")
    sides = [[_text(row, side) for row in rows] for side in ("positive", "negative")]
    return Pairs(sides[0], sides[1], read=read, prepend_bos=prepend_bos)


def shipped_texts(name: str, *, split: str | None = None) -> list[str]:
    """Texts that come with steerlens: `shipped_texts("prompts", split="held_out")`.

    Args:
        name: `"neutral"`, plain sentences that are no side of any shipped pair; `"prompts"`, beginnings of sentences;
            `"instructions"`, harmless requests for a chat model.
        split: As in `shipped`.

    Raises:
        ValueError: an unknown name or split; the message lists the known ones.
    """
    return [row["text"] for row in _rows(resources.files("steerlens") / "data" / "texts", name, split, "texts")]


def _rows(folder: Traversable, name: str, split: str | None, what: str) -> list[dict[str, Any]]:
    known = sorted(entry.name.removesuffix(".jsonl") for entry in folder.iterdir() if entry.name.endswith(".jsonl"))
    if name not in known:
        raise ValueError(f"no shipped {what} {name!r}; there are {', '.join(known)}")
    if split is not None and split not in SPLITS:
        raise ValueError(f"split={split!r}; it is one of {', '.join(SPLITS)}, or None for both")
    lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if split is None or row["split"] == split]


def _text(row: dict[str, Any], side: str) -> str | tuple[str, str]:
    return (row["prompt"], row[side]) if "prompt" in row else row[side]
