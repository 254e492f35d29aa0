"""What the laws of one group remember of a sequence: for all rows together, or for each row by itself."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Ordered
from functools import partial
from typing import Any

import torch
from torch import Tensor

from steerlens.core.law import Signals
from steerlens.core.now import Now

#: The sentence for a law that remembers its last token only.
LOST = (
    "a law remembers the tokens of its sequence by the last one only, and the KV cache has lost some tokens of a pass "
    "that it saw at once, as speculative decoding does when it rejects a draft: leave prompt_lookup_num_tokens and "
    "assistant_model out, cut the cache where a pass has ended, or keep a value for every token in now.sequence"
)

#: The sentence for a law whose memory goes through all layers.
STEPWISE = (
    "a law remembers all layers of the token before, so that generated tokens must come one at a time: leave "
    "prompt_lookup_num_tokens and assistant_model out, or pid's carry=True"
)


class Memory:
    """One dictionary for all rows; one for each row once the rows of a pass differ in the tokens that are selected.

    A law so sees the tokens of a row that are selected, and no other, as it does for the row alone.

    Attributes:
        together: Of all rows, `[batch pos ...]`.
        rows: Of each row, `[1 pos ...]`; None: the rows are together.
        layers: Of the present pass, by row: what laws remember over its layers.
        lost: Tokens were taken back that a law remembers in a form from which they cannot be taken out.
    """

    def __init__(self) -> None:
        self.together: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] | None = None
        self.layers: list[dict[str, Any]] | None = None
        self.lost = False

    def fork(self) -> Memory:
        """A copy that goes on by itself; tensors are shared, as laws do not write into them."""
        twin = Memory()
        twin.together, twin.lost = dict(self.together), self.lost
        twin.rows = None if self.rows is None else [dict(row) for row in self.rows]
        return twin

    def split(self, batch: int) -> None:
        """From now on, each row by itself."""
        self.rows = [_of_row(self.together, row, None) for row in range(batch)]
        self.together.clear()

    def pick(self, index: Tensor) -> None:
        """Take other rows, `[new batch]`."""
        for name, value in self.together.items():
            self.together[name] = value[index.to(value.device)] if isinstance(value, Tensor) else value
        if self.rows is not None:
            self.rows = [dict(self.rows[row]) for row in index.tolist()]

    def cut(self, before: Memory, selection: slice | Tensor | None, column: int) -> None:
        """The latest pass has lost its columns from this one on.

        Args:
            before: As it was before that pass.
            selection: The tokens of that pass which the laws have seen, as in `Positions.select`.
            column: Counted from the pass's first one.
        """
        if selection is None:
            return
        if self.rows is None:
            if self.together and isinstance(selection, slice):
                self.together = self._cut(self.together, before.together, *_counts(selection, 0, column))
            return
        for row, held in enumerate(self.rows):
            old = before.rows[row] if before.rows is not None else _of_row(before.together, row, None)
            self.rows[row] = self._cut(held, old, *_counts(selection, row, column))

    def _cut(self, held: dict[str, Any], before: dict[str, Any], seen: int, kept: int) -> dict[str, Any]:
        """What a law knew when it had seen the first `kept` of the `seen` tokens of a pass."""
        if kept == seen:
            return held
        if kept == 0:
            return dict(before)
        found: dict[str, Any] = {}
        for name, value in held.items():
            if isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == seen:
                found[name] = value[:, :kept]
            elif before.get(name) is value:
                found[name] = value
            else:
                self.lost = True
        return found


#: A law, from `[batch pos ...]`.
Act = Callable[[Tensor, Now], tuple[Tensor, Signals]]


def apart(act: Act, x: Tensor, selection: Any, now: Now, memory: Memory, names: Ordered[str]) -> tuple[Tensor, Signals]:
    """A law's control and signals under a mask; row by row for one that remembers, with its selected tokens only.

    Args:
        x: The states of all tokens, `[batch pos ...]`.
        selection: The mask, `[batch pos]`; anything else: all tokens are selected.
        now: For all rows and tokens.
        names: Of the law's signals.
    """
    if memory.rows is None:
        kept, layers = dict(memory.together), dict(now.layers)
        u, signals = act(x, now)
        if not memory.together:  # it remembers nothing
            return u, signals
        for table, before in ((memory.together, kept), (now.layers, layers)):
            table.clear()
            table.update(before)
        memory.split(len(x))
    u, signals = _by_rows(act, x, selection, now, memory)
    return u, signals or dict.fromkeys(names, partial(torch.full, x.shape[:2], torch.nan, device=x.device))


def _by_rows(act: Act, x: Tensor, selection: Any, now: Now, memory: Memory) -> tuple[Tensor, Signals]:
    """A law called for each row with the tokens that are selected in it; zero and NaN at the others."""
    batch, length = x.shape[:2]
    everything = torch.arange(length, device=x.device)
    columns = [row.nonzero().flatten() for row in selection] if isinstance(selection, Tensor) else [everything] * batch
    assert memory.rows is not None
    if memory.layers is None:
        memory.layers = [_of_row(now.layers, row, columns[row]) for row in range(batch)]
    parts: list[tuple[int, Tensor, Signals]] = []
    u = torch.zeros_like(x)
    for row, own in enumerate(columns):
        if not len(own):
            continue
        part, signals = act(x[row : row + 1, own], now.of_row(row, own, memory.layers[row], memory.rows[row]))
        u = u.to(part.dtype)
        u[row, own] = part[0]
        parts.append((row, own, signals))
    names = list(parts[0][2]) if parts else []
    return u, {name: partial(_assembled, name, parts, (batch, length)) for name in names}


def _assembled(name: str, parts: Ordered[tuple[int, Tensor, Signals]], shape: tuple[int, int]) -> Tensor:
    """A signal of all rows, `[batch pos ...]`, NaN where no law was called."""
    found = None
    for row, own, signals in parts:
        value = signals[name]()
        if found is None:
            found = value.new_full((*shape, *value.shape[2:]), torch.nan)
        found[row, own] = value[0]
    assert found is not None
    return found


def _of_row(table: dict[str, Any], row: int, columns: Tensor | None) -> dict[str, Any]:
    """What is remembered of one row; of some of its tokens if columns are given."""
    found = {}
    for name, value in table.items():
        if isinstance(value, Tensor):
            value = value[row : row + 1]
            value = value if columns is None or value.ndim < 2 else value[:, columns]
        found[name] = value
    return found


def _counts(selection: slice | Tensor, row: int, column: int) -> tuple[int, int]:
    """How many tokens of a row a law has seen in a pass, and how many of them lie before a column."""
    if isinstance(selection, slice):
        seen = selection.stop - selection.start
        return seen, min(max(column - selection.start, 0), seen)
    return int(selection[row].sum()), int(selection[row, :column].sum())
