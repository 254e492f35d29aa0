"""Which tokens of a forward pass a loop may touch, told in absolute positions that a KV cache cannot shift."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NAMES = ("last", "last_prompt", "generated", "prompt", "all")
#: Names of positions that no pass after the first of a sequence has.
PROMPT_ONLY = ("prompt", "last_prompt")
_END = 1 << 60


def check_where(where: Any) -> None:
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
    elif not callable(where):
        raise TypeError(f"where={where!r}; give one of {', '.join(NAMES)}, a slice, a bool mask or a callable")


class Positions:
    """Absolute positions of the tokens of each forward pass, followed through a generation.

    A position counts the real tokens of a row from 0, so it means the same in a left-padded batch, in the row alone,
    with a KV cache and without one. The prompt is the first pass of a sequence.
    """

    def __init__(self) -> None:
        self.batch = self.length = self.past = self.seen = 0
        self.padded = False
        self.prompt: Any = 0  # int, or [batch] where rows differ
        self.index: Tensor | None = None  # [batch length], -1 at pads; None where no row is padded
        self._mask: Tensor | None = None  # of the whole sequence so far
        self.device: torch.device | None = None

    def begin(self, shape: tuple[int, int], past: int, mask: Tensor | None, *, continues: bool, device: Any) -> bool:
        """Enter a forward pass over `shape` = (batch, length) new tokens after `past` cached ones.

        Args:
            mask: 1 for real tokens, `[batch past+length]` or `[batch length]`; None: all are real, of a sequence that
                continues all that are new.
            continues: the caller knows that this pass belongs to the sequence of the previous one.

        Returns:
            True where a new sequence begins.
        """
        batch, length = shape
        if mask is not None and mask.ndim != 2:
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; steering needs the 2-d [batch pos] mask")
        # the cache holds exactly what the last pass left behind: the user decodes by hand
        follows = past > 0 and (batch, past) == (self.batch, self.seen)
        fresh = not (continues or follows)
        self.batch, self.length, self.past, self.seen = batch, length, past, past + length
        self.device = torch.device(device) if device is not None else None
        if fresh:
            self._mask = None
            # one host-device sync for a prompt, none while decoding
            self.padded = mask is not None and not bool(mask.all())
        self.index = None
        if self.padded:
            full = self._whole(mask, past + length)
            self.index = torch.where(full > 0, full.cumsum(1) - 1, -1)[:, -length:]
            if fresh:
                self.prompt = full.sum(1)
        elif fresh:
            self.prompt = past + length
        return fresh

    def _whole(self, mask: Tensor | None, total: int) -> Tensor:
        """The mask of the whole sequence so far, `[batch total]`, whatever part of it came in."""
        before = self._mask if self._mask is not None and self._mask.shape[0] == self.batch else None
        if mask is None or mask.shape[1] < total:
            new = torch.ones(self.batch, 0, dtype=torch.long) if mask is None else mask
            old = torch.ones(self.batch, 0, dtype=torch.long) if before is None else before[:, : total - new.shape[1]]
            gap = torch.ones(self.batch, total - old.shape[1] - new.shape[1], dtype=torch.long, device=self.device)
            mask = torch.cat([old.to(gap), gap, new.to(gap)], dim=1)
        self._mask = mask.to(device=self.device, dtype=torch.long)
        return self._mask

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

    def select(self, where: Any) -> slice | Tensor | None:
        """The columns to touch: None (nothing), a slice of this pass's tokens, or a bool mask `[batch length]`."""
        if isinstance(where, (str, slice)):
            low, high = _bounds(where, self.prompt)
            if self.index is None:
                start = min(max(int(low) - self.past, 0), self.length)
                stop = min(max(int(high) - self.past, 0), self.length)
                return slice(start, stop) if start < stop else None
            return (self.index >= _column(low)) & (self.index < _column(high)) & (self.index >= 0)
        table = self.table()
        mask = _lookup(where, table) if isinstance(where, Tensor) else where(table)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != table.shape:
            raise ValueError(f"where() must return a bool mask of shape {tuple(table.shape)}, it returned {mask!r}")
        return mask & (table >= 0)


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
