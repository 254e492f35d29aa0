"""Progress bars: of every loop that may take more than a few seconds, and silent on request."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")

#: Seconds before a bar is shown: what is done by then needs none.
DELAY_S = 1.0
#: tqdm's own switch, which it reads once, when it is imported; here it counts at any time.
SWITCH = "TQDM_DISABLE"
#: Whether this thread is inside of a loop that has a bar, or was asked to have none: loops in it show none.
_inside = threading.local()


def bar(items: Sequence[Item], *, desc: str, progress: bool = True) -> Iterator[Item]:
    """Items, under a bar of `tqdm.auto` that vanishes when they are done.

    `TQDM_DISABLE=1` in the environment silences all bars, also those of transformers; `progress=False` those of one
    loop and of all loops inside it. A single item needs no bar, and leaves that to the loops inside.
    """
    if len(items) < 2 and progress:
        yield from items
        return
    with counting(len(items), desc=desc, progress=progress) as shown:
        for item in items:
            yield item
            shown.update()


@contextmanager
def counting(total: int, *, desc: str, progress: bool = True) -> Iterator[Any]:
    """A bar of `tqdm.auto` whose `update()` counts to a total; as `bar`."""
    # not at the top: in a notebook it is a class that a server lacks
    from tqdm.auto import tqdm

    nested = getattr(_inside, "loop", False)
    silent = nested or not progress or os.environ.get(SWITCH, "0").lower() not in ("", "0", "false")
    _inside.loop = True
    try:
        with tqdm(total=total, desc=desc, disable=silent, leave=False, delay=DELAY_S) as shown:
            yield shown
    finally:
        _inside.loop = nested
