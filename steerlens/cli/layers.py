"""Layers as they are typed: `15`, `3,9`, `5-10` or `0,5-10`."""

from __future__ import annotations

import re

#: More than any model has; a range is not written out before it is known to be short.
MOST = 10_000
_PART = re.compile(r"(\d+)(?:-(\d+))?")


def parse_layers(text: str, name: str = "--layers", every: str | None = None) -> list[int]:
    """The layers in the order in which they are typed.

    Args:
        text: Numbers and ranges, both ends included, with commas between.
        name: What the message calls the option.
        every: A word for all layers that the caller knows, for the message.

    Raises:
        ValueError: something else, a range from the larger to the smaller layer, or a layer named twice.
    """
    forms = ["15", "3,9", "5-10", *([every] if every else [])]
    found: list[int] = []
    for part in text.replace(" ", "").split(","):
        match = _PART.fullmatch(part)
        if match is None:
            raise ValueError(f"{name}={text}: {part!r} is no layer; write {', or '.join(forms)}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"{name}={text}: {part} is an empty range; write {last}-{first}")
        if last > MOST:
            raise ValueError(f"{name}={text}: no model has a layer {last}; layers are counted from 0")
        found += range(first, last + 1)
    twice = next((layer for layer in found if found.count(layer) > 1), None)
    if twice is not None:
        raise ValueError(f"{name}={text} names layer {twice} twice")
    return found
