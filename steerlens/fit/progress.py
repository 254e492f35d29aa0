"""Progress bars: of every loop that may take more than a few seconds, and silent where somebody says so."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

#: Seconds before a bar is shown: what is done by then needs none.
DELAY_S = 1.0
#: tqdm's own switch, which it reads once, when it is imported; here it counts at any time.
SWITCH = "TQDM_DISABLE"


def bar(items: Iterable[Any] | None = None, *, desc: str, progress: bool = True, total: int | None = None) -> Any:
    """Items under a bar of `tqdm.auto`, or, for none and a total, a bar with `update`; it vanishes when it is done.

    `TQDM_DISABLE=1` in the environment silences all bars, also those of transformers and datasets; `progress=False`
    those of one call.
    """
    # not at the top: in a notebook it is a class that a server lacks
    from tqdm.auto import tqdm

    silent = not progress or os.environ.get(SWITCH, "0").lower() not in ("", "0", "false")
    return tqdm(items, desc=desc, total=total, disable=silent, leave=False, delay=DELAY_S)
