"""Which tokens of a forward pass a loop may touch, in absolute positions that a KV cache cannot shift."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steerlens.core.part import map_tensors
from steerlens.core.span import Span
from steerlens.core.types import Where

NAMES = ("last", "last_prompt", "generated", "prompt", "all")
#: Names of positions that no pass after the first of a sequence has.
PROMPT_ONLY = ("prompt", "last_prompt")
#: Names of positions that begin with the last token of the prompt.
_FROM_LAST = ("last", "last_prompt", "generated")
_END = 1 << 60


def check_where(where: object) -> None:
    """Raises ValueError or TypeError unless `where` is one of the forms that `Loop` documents."""
    if isinstance(where, str):
        if where not in NAMES:
            raise ValueError(f"where={where!r}; a name is one of {', '.join(NAMES)}, or give a slice, mask or callable")
    elif isinstance(where, slice):
        if where.step not in (None, 1):
            raise ValueError(f"where={where!r} has a step; use a mask or a callable for every n-th position")
        bounds = [bound for bound in (where.start, where.stop) if bound is not None]
        if not all(isinstance(bound, int) and abs(bound) < _END for bound in bounds):
            raise ValueError(f"where={where!r}; the bounds of a slice are positions, whole numbers")
    elif isinstance(where, Tensor):
        if where.dtype != torch.bool or where.ndim not in (1, 2):
            raise ValueError(
                f"where is a {where.dtype} tensor of {where.ndim} dimensions; a mask is bool [pos] or [batch pos]"
            )
    elif not callable(where) and not isinstance(where, Span):
        # not the value itself: a list of tensors fills a screen
        shown = where if isinstance(where, (int, float)) else f"a {type(where).__name__}"
        raise TypeError(
            f"where is {shown}; give one of {', '.join(NAMES)}, a slice, a bool mask, a callable or what after() gives"
        )


class Positions:
    """Absolute positions of the tokens of one sequence, pass by pass, and where its prompt ends.

    A position counts the real tokens of a row from 0, so it means the same in a left-padded batch, in the row alone,
    with a KV cache and without one. A column counts pads too: it is an index into the KV cache.

    Attributes:
        batch, length, past: Rows and new columns of the present pass, and columns before it.
        seen: Columns up to the end of the present pass.
        end: First column after the prompt; pads behind a short prompt count as prompt here.
        start: First column that may hold a token after the prompt.
        prompt: Real tokens of the prompt, a number or `[batch]`.
        padded: Some row has a pad.
        index: Positions of the present pass, `[batch length]`, -1 at pads; None if no row has a pad.
    """

    def __init__(self) -> None:
        self.batch = self.length = self.past = self.seen = self.end = self.start = 0
        self.padded = False
        self.prompt: Any = 0
        self.index: Tensor | None = None
        self.device: torch.device | None = None
        self._index: Tensor | None = None  # of all columns so far
        self._mask: Tensor | None = None
        self._tokens: Tensor | None = None  # of the present pass
        # of each span: itself on the tokens' device, and its state after every column so far
        self._spans: dict[int, tuple[Span, Tensor]] = {}

    def begin(
        self,
        shape: tuple[int, int],
        past: int,
        mask: Tensor | None,
        *,
        device: Any = None,
        end: int | None = None,
        lengths: Any = None,
        tokens: Tensor | None = None,
    ) -> bool:
        """Enter a forward pass over `shape` = (batch, length) new tokens after `past` cached ones.

        The prompt ends where `lengths` or `end` say. Without both, a pass of several tokens continues the prompt, and a
        pass of one token after others is a decoding step.

        Args:
            mask: 1 for real tokens, `[batch past+length]` or `[batch length]`; None: all that are new are real.
            end: First column after the prompt, which may be ahead of this pass.
            lengths: Real tokens of each row's prompt, a number or `[batch]`.
            tokens: Ids of the new tokens, `[batch length]`, for a `where` that goes by the text.

        Returns:
            True if the prompt is another one than before this pass.

        Raises:
            ValueError: a mask that is not 2-d; a number of lengths that is not the number of rows.
        """
        batch, length = shape
        if mask is not None and mask.ndim != 2:
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; steering needs the 2-d [batch pos] mask")
        first = self.seen == 0 or batch != self.batch
        repeats = not first and past == 0 and end is not None and end == self.end
        self.batch, self.length, self.past, self.seen = batch, length, past, past + length
        self.device = torch.device(device) if device is not None else None
        if (first or past == 0) and not repeats:
            self._mask, self.padded = None, False
        if not self.padded and mask is not None and (first or length > 1) and not repeats:
            # one host-device sync for a prompt, none while decoding
            self.padded = not bool(mask.all())
        self._tokens = tokens
        self._spans = (
            {}
            if first or not self._spans
            else {key: (span, kept[:, :past]) for key, (span, kept) in self._spans.items()}
        )
        self._index = self.index = None
        if self.padded:
            full = self._whole(mask, self.seen)
            self._index = torch.where(full > 0, full.cumsum(1) - 1, -1)
            self.index = self._index[:, -length:]
        return self._end_prompt(first, repeats, end, lengths)

    def _end_prompt(self, first: bool, repeats: bool, end: int | None, lengths: Any) -> bool:
        """Settle where the prompt ends; True if that has changed."""
        if lengths is not None:
            self.end, self.start, before = self.seen, 0, self.prompt
            self.prompt = self._rows_of(lengths)
            return first or self.past == 0 or not _same(before, self.prompt)
        if end is not None:
            if repeats or (not first and self.past >= end == self.end):
                return False
            self.end = end
        elif self.length == 1 and self.past > 0:
            if not first:
                return False
            self.end = self.past
        else:
            self.end = self.seen
        self.start = self.end
        reached = min(self.end, self.seen)
        if self._mask is None:
            self.prompt = self.end
        else:
            # what is still to come of a prompt that is read in pieces has no pads
            self.prompt = self._mask[:, :reached].sum(1) + (self.end - reached)
        return True

    def _rows_of(self, lengths: Any) -> Any:
        """Lengths of prompts as a number, or one number for each row."""
        if isinstance(lengths, int):
            return lengths
        rows = torch.as_tensor(lengths, dtype=torch.long)
        if rows.ndim != 1 or len(rows) != self.batch:
            raise ValueError(f"scoring() was given {rows.numel()} prompt lengths for a batch of {self.batch} rows")
        same = rows.device.type == "cpu" and len(rows) > 0 and bool((rows == rows[0]).all())
        return int(rows[0]) if same else rows.to(self.device)

    def _whole(self, mask: Tensor | None, total: int) -> Tensor:
        """The mask of the whole sequence so far, `[batch total]`, whatever part of it came in."""
        before = self._mask if self._mask is not None and self._mask.shape[0] == self.batch else None
        if mask is None or mask.shape[1] < total:
            new = torch.ones(self.batch, 0, dtype=torch.long) if mask is None else mask
            old = torch.ones(self.batch, 0, dtype=torch.long) if before is None else before[:, : total - new.shape[1]]
            gap = torch.ones(self.batch, total - old.shape[1] - new.shape[1], dtype=torch.long, device=self.device)
            mask = torch.cat([old.to(gap), gap, new.to(gap)], dim=1)
        self._mask = mask[:, :total].to(device=self.device, dtype=torch.long)
        return self._mask

    def cut(self, column: int) -> None:
        """Forget the columns from this one on."""
        self.seen = min(self.seen, column)
        if self._mask is not None:
            self._mask = self._mask[:, :column]
        self._spans = {key: (span, kept[:, :column]) for key, (span, kept) in self._spans.items()}

    def rows(self, index: Tensor) -> None:
        """Replace the rows by others, `[new batch]` indices of the present ones."""
        self.batch = len(index)
        for name in ("_mask", "_index", "index", "prompt"):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                setattr(self, name, value[index.to(value.device)])
        self._spans = {key: (span, kept[index.to(kept.device)]) for key, (span, kept) in self._spans.items()}

    @property
    def complete(self) -> bool:
        """Whether the whole prompt has gone through the model."""
        return self.seen >= self.end

    def table(self) -> Tensor:
        """Absolute positions `[batch length]`; -1 at pads."""
        if self.index is not None:
            return self.index
        row = torch.arange(self.past, self.past + self.length, device=self.device)
        return row.expand(self.batch, self.length)

    def steps(self) -> Tensor:
        """How many tokens each is after the last one of the prompt, `[batch length]`; negative before it."""
        last = self.prompt - 1
        return self.table() - (last[:, None] if isinstance(last, Tensor) else last)

    def whole(self) -> Positions:
        """The same sequence as if it had gone through the model in one pass."""
        return self.part(0, self.seen)

    def part(self, past: int, seen: int) -> Positions:
        """The same sequence as of a pass over these columns of it."""
        part = Positions()
        part.__dict__.update(self.__dict__)
        part.past, part.length, part.seen = past, seen - past, seen
        part.index = None if self._index is None else self._index[:, past:seen]
        return part

    def select(self, where: Where) -> slice | Tensor | None:
        """The columns to touch: None (nothing), a slice of this pass's tokens, or a bool mask `[batch length]`."""
        if isinstance(where, (str, slice)):
            if where in PROMPT_ONLY and self.past >= self.end:
                return None
            if (where in _FROM_LAST and not self.complete) or (where == "generated" and self.seen <= self.start):
                return None
            low, high = _bounds(where, self.prompt)
            if self.index is None and not isinstance(low, Tensor) and not isinstance(high, Tensor):
                start = min(max(int(low) - self.past, 0), self.length)
                stop = min(max(int(high) - self.past, 0), self.length)
                return slice(start, stop) if start < stop else None
            index = self.table()
            return (index >= _column(low)) & (index < _column(high)) & (index >= 0)
        table = self.table()
        if isinstance(where, Span):
            # as the names do, it leaves position 0 alone
            return self._inside(where).to(table.device) & (table > 0)
        mask = _lookup(where, table) if isinstance(where, Tensor) else where(table)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != table.shape:
            raise ValueError(f"where() must return a bool mask of shape {tuple(table.shape)}, it returned {mask!r}")
        return mask & (table >= 0)

    def _inside(self, span: Span) -> Tensor:
        """Whether the tokens of this pass lie in a span, `[batch length]`."""
        placed, kept = self._spans.get(id(span), (None, None))
        if kept is None or kept.shape[1] < self.seen:
            tokens, count = self._tokens, 0 if kept is None else kept.shape[1]
            if tokens is None or tokens.ndim != 2:
                raise RuntimeError(f"where={span} goes by the ids of the tokens, and this pass was given none")
            if count != self.past:
                raise RuntimeError(
                    f"where={span} goes by the whole text, but {self.past - count} of its tokens went through the "
                    "model before it was steered; begin with an empty KV cache"
                )
            if placed is None:
                placed = map_tensors(span, lambda tensor: tensor.to(tokens.device))
            new = _scan(placed, tokens, self.index, None if kept is None or not count else kept[:, -1])
            kept = new if kept is None else torch.cat([kept, new], dim=1)
            self._spans[id(span)] = placed, kept
        assert placed is not None
        return placed.inside[kept[:, self.past : self.past + self.length]]


def _scan(span: Span, tokens: Tensor, index: Tensor | None, before: Tensor | None) -> Tensor:
    real = None if index is None else index.to(tokens.device) >= 0
    if tokens.shape[1] == 1 or tokens.device.type == "cpu":
        return span.states(tokens, real, before)
    # a prompt token by token is many small kernels; one host-device sync is cheaper
    here = [None if value is None else value.cpu() for value in (tokens, real, before)]
    on_cpu: Span = map_tensors(span, lambda tensor: tensor.cpu())
    return on_cpu.states(*here).to(tokens.device)  # type: ignore[arg-type]


def _bounds(where: str | slice, prompt: Any) -> tuple[Any, Any]:
    """Half-open range of absolute positions; entries are numbers or `[batch]` tensors."""
    if where == "last":
        return _at_least_one(prompt - 1), _END
    if where == "last_prompt":
        return _at_least_one(prompt - 1), prompt
    if where == "generated":
        return _at_least_one(prompt), _END
    if where == "prompt":
        return 1, prompt
    if where == "all":
        return 1, _END
    assert isinstance(where, slice)
    low = 0 if where.start is None else where.start
    high = _END if where.stop is None else where.stop
    return (prompt + low if low < 0 else low), (prompt + high if high < 0 else high)


def _at_least_one(bound: Any) -> Any:
    return bound.clamp(min=1) if isinstance(bound, Tensor) else max(bound, 1)


def _column(bound: Any) -> Any:
    return bound[:, None] if isinstance(bound, Tensor) else bound


def _lookup(mask: Tensor, table: Tensor) -> Tensor:
    """A mask given on absolute positions, read at the positions of this pass; False beyond its end."""
    mask = mask.to(table.device)
    rows = mask if mask.ndim == 2 else mask[None]
    if rows.shape[0] not in (1, table.shape[0]):
        raise ValueError(f"where is a mask of {rows.shape[0]} rows, the batch has {table.shape[0]}")
    rows = rows.expand(table.shape[0], -1)
    inside = (table >= 0) & (table < rows.shape[1])
    return rows.gather(1, table.clamp(0, rows.shape[1] - 1)) & inside


def _same(a: Any, b: Any) -> bool:
    """Whether two numbers of tokens are one; tensors are not looked into."""
    return a is b or (isinstance(a, int) and isinstance(b, int) and a == b)
