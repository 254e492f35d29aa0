"""What went into a model in the passes of one sequence, kept to be read once more without a controller."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor


class Text:
    """The arguments of all passes of a sequence that tell its tokens.

    Attributes:
        length: Number of columns, from the first one on.
    """

    def __init__(self) -> None:
        self.length = 0
        self._pieces: list[dict[str, Tensor]] = []

    def add(self, past: int, piece: dict[str, Tensor | None]) -> None:
        """Take a pass after `past` columns, `[batch pos ...]` by argument; None: the call did not give it."""
        given = {name: value for name, value in piece.items() if value is not None}
        if past == self.length:
            self._pieces.append(given)
            self.length += next(iter(given.values())).shape[1]

    def whole(self, length: int) -> dict[str, Tensor]:
        """All passes as one of this many columns.

        Raises:
            RuntimeError: some of them are missing, or their calls were not given the same arguments.
        """
        names = {name for piece in self._pieces for name in piece}
        if self.length != length or any(names - set(piece) - {"position_ids"} for piece in self._pieces):
            refuse_partial(length)
        if "position_ids" in names:
            self._count()
        found = {}
        for name in names:
            values = [piece[name] for piece in self._pieces]
            rows = max(len(value) for value in values)  # positions may come as one row for all
            found[name] = torch.cat([value.expand(rows, *value.shape[1:]) for value in values], dim=1)
        return found

    def _count(self) -> None:
        """Give passes without positions those that transformers gives them: their columns."""
        start = 0
        for piece in self._pieces:
            tokens = next(iter(piece.values()))
            stop = start + tokens.shape[1]
            piece.setdefault("position_ids", torch.arange(start, stop, device=tokens.device)[None])
            start = stop

    def rows(self, index: Tensor) -> None:
        """Take other rows, `[new batch]`."""
        for piece in self._pieces:
            rows = max(len(value) for value in piece.values())
            piece.update({name: value[index.to(value.device)] for name, value in piece.items() if len(value) == rows})

    def cut(self, column: int) -> None:
        """Forget the columns from this one on."""
        kept, start = [], 0
        for piece in self._pieces:
            if start < column:
                kept.append({name: value[:, : column - start] for name, value in piece.items()})
            start += next(iter(piece.values())).shape[1]
        self._pieces, self.length = kept, min(self.length, column)

    def fork(self) -> Text:
        """A copy that goes on by itself."""
        twin = Text()
        twin.length, twin._pieces = self.length, [dict(piece) for piece in self._pieces]
        return twin


def text_of(kept: dict[Any, Any], past: int) -> Text:
    """The text of a sequence, from what it keeps; a new one if it begins."""
    if past == 0 or "text" not in kept:
        kept["text"] = Text()
    text: Text = kept["text"]
    return text


def refuse_partial(length: int) -> NoReturn:
    """Raises RuntimeError."""
    raise RuntimeError(
        f"a loop needs the unsteered state of the whole text, but some of its {length} tokens went through the model "
        "before it was steered; begin with an empty KV cache"
    )
