"""What a run kept of its signals: a plain mapping from hook names to tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from steerlens.core.tables import described, find
from steerlens.core.types import Cache, Figure, Frame

#: What a sequence has recorded, see `blank`.
Store: TypeAlias = dict[str, Any]


def blank() -> Store:
    """What a sequence without columns has recorded: plain values, so that a server can send them back.

    `pieces`: for each signal the values of each pass, as (first column, number of moves before it, `[batch pos ...]`).
    `moves`: the rows that took the place of those before, `[new batch]` each, in order. `length`: columns so far.
    """
    return {"pieces": {}, "moves": [], "length": 0}


def cut(store: Store, column: int) -> None:
    """Drop the columns from this one on: they are computed anew, or were rejected."""
    if column >= store["length"]:
        return
    store["length"] = column
    if column == 0:
        store["pieces"].clear()
        store["moves"].clear()
    for name, pieces in store["pieces"].items():
        store["pieces"][name] = [
            (start, age, value[:, : column - start]) for start, age, value in pieces if start < column
        ]


def take(store: Store, beams: Tensor, end: int) -> None:
    """Give a beam search's record the rows of what it returns.

    Args:
        beams: The row that each token of each returned text came from, `[text step]`; -1 behind a text's end.
        end: First column after the prompt.
    """
    for name, pieces in store["pieces"].items():
        kept = []
        for start, _, value in pieces:
            rows = beams[:, max(start + value.shape[1] - end, 0)].to(value.device)
            there = (rows >= 0).view(-1, *[1] * (value.ndim - 1))
            kept.append((start, 0, torch.where(there, value[rows.clamp(min=0)], torch.nan)))
        store["pieces"][name] = kept
    store["moves"].clear()


class Record(Mapping[str, Tensor]):
    """Signals of one sequence, `{"blocks.5.hook_steer_error": [batch pos], ...}`.

    A name may be short, as in an `ActivationCache`: `record["steer_error", 5]` or `record["error", 5]`.

    One column per token of the sequence, in its order, and one row per text: a generation's columns are the prompt and
    every generated token that went through the model, whether or not a KV cache was used, its rows those of what it
    returns. A column that is computed again is overwritten; one that the model discards (assisted generation) is
    dropped. A scalar is NaN, and a control zero, at tokens that were not steered.

    Attributes:
        held: What is recorded, under `"now"`, see `blank`. Always the same dict, so that a server can fill the object
            that is sent to it and send it back.
    """

    def __init__(self) -> None:
        self.held: Store = {"now": blank()}

    def show(self, store: Store) -> None:
        """Show another sequence from now on."""
        self.held["now"] = store

    @property
    def pieces(self) -> dict[str, list[tuple[int, int, Tensor]]]:
        """The values of each pass, by signal."""
        return self.held["now"]["pieces"]

    def __getitem__(self, name: str | tuple[str, int]) -> Tensor:
        pieces, moves = self.pieces[find(self, name)], self.held["now"]["moves"]
        if len(pieces) == 1 and not moves:
            return pieces[0][2]
        # a pass in which no token was selected does not know a signal's shape beyond batch and position
        trailing = max((value for _, _, value in pieces), key=lambda value: value.ndim).shape[2:]
        rows = _since(moves)
        whole = []
        for _, age, value in pieces:
            if value.ndim != 2 + len(trailing):
                value = value.view(*value.shape, *[1] * len(trailing)).expand(-1, -1, *trailing)
            row = rows[age]
            whole.append(value if row is None else value[row.to(value.device)])
        return torch.cat(whole, dim=1)

    def __iter__(self) -> Iterator[str]:
        return (name for name, pieces in self.pieces.items() if pieces)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in list(self) or (isinstance(name, tuple) and _holds(self, name))

    def __repr__(self) -> str:
        first = next(iter(self), None)
        if first is None:
            return f"Record({described(self)})"
        rows, tokens = self[first].shape[:2]
        count = f"{len(self)} signal{'s' * (len(self) != 1)} of {rows} row{'s' * (rows != 1)}"
        size = f"{count}, {tokens} token{'s' * (tokens != 1)}"
        return f"Record({size}: {described(self).removeprefix('the record holds ')})"

    def _repr_html_(self) -> str:
        from steerlens.core.tables import VIEWS

        return VIEWS["record"](self)

    def layers(self, signal: str) -> dict[int, Tensor]:
        """One signal by layer: `layers("error")[5]` is `record["blocks.5.hook_steer_error"]`."""
        found = {}
        for name in self:
            head, _, tail = name.partition(".hook_steer_")
            if tail == signal:
                found[int(head.removeprefix("blocks."))] = self[name]
        if not found:
            held = sorted({name.partition(".hook_steer_")[2] for name in self})
            raise KeyError(f"no signal {signal!r} was recorded; the record holds {', '.join(held) or 'nothing'}")
        return dict(sorted(found.items()))

    def stack(self, signal: str) -> Tensor:
        """One signal over all layers that have it, `[layer batch pos ...]`."""
        return torch.stack([value.cpu() for value in self.layers(signal).values()])

    def frame(self) -> Frame:
        """The signals of one number per token as a pandas DataFrame in long form: one line for each number.

        Columns: `row` of the batch, `token` (column of the sequence), `layer`, `signal` (`error`, `u_norm`, ...) and
        `value`, in the signal's unit; NaN at tokens that were not steered. Signals with more numbers per token, as `u`,
        are left out.

        Raises:
            ImportError: pandas is not installed.
        """
        from steerlens.core.tables import frame  # as for files: only the user's side needs it

        return frame(self)

    def plot(self, *, row: int = 0, tokens: list[str] | None = None) -> Figure:
        """Tracking error and control norm by layer and token, a plotly figure.

        Args:
            row: Of the batch.
            tokens: Labels of the columns; default: their positions.

        Raises:
            ImportError: plotly is not installed.
            ValueError: nothing that can be drawn was recorded.
        """
        from steerlens.core.tables import VIEWS

        return VIEWS["plot"](self, row=row, tokens=tokens)

    def to_cache(self, model: object = None) -> Cache:
        """A TransformerLens `ActivationCache` with the same names, for `stack_activation` and the like.

        Args:
            model: The steered model; the cache needs it for its methods that project on weights.

        Raises:
            ImportError: TransformerLens is not installed.
        """
        from steerlens.core.tables import VIEWS

        return VIEWS["cache"](self, model)

    def copy(self) -> Record:
        """A record that later passes do not change."""
        copy = Record()
        copy.held["now"] = blank() | {"pieces": {name: [(0, 0, self[name].clone())] for name in self}}
        return copy

    def save(self, path: str | Path) -> None:
        """Write the signals to a safetensors file; an older one is replaced when the new one is complete.

        Raises:
            OSError: it cannot be written there.
        """
        from steerlens.core.tensorfile import write  # not at the top: this module travels, and files do not

        write(path, {"kind": "record"}, {name: self[name] for name in self})

    @classmethod
    def load(cls, path: str | Path) -> Record:
        """Read a file written by `save`.

        Raises:
            OSError: there is no such file, or it cannot be read.
            ValueError: it holds no record, or was damaged.
        """
        from steerlens.core.tensorfile import read

        record = cls()
        try:
            _, tensors = read(path, "record")
            for name, value in tensors.items():
                head, _, signal = name.partition(".hook_steer_")
                if not (head.startswith("blocks.") and head[7:].isdecimal() and signal and value.ndim >= 2):
                    raise ValueError(f"its tensor {name!r} is no signal [batch pos ...]")
                record.pieces[name] = [(0, 0, value)]
            sizes = sorted({tuple(value.shape[:2]) for value in tensors.values()})
            if len(sizes) > 1:
                raise ValueError(
                    f"its signals are of {sizes[0]} and of {sizes[1]} rows and tokens, not of one sequence"
                )
        except ValueError as error:
            raise ValueError(f"{path} was not loaded: {error}") from None
        return record


def _holds(record: Record, name: tuple[Any, ...]) -> bool:
    try:
        find(record, name)
    except KeyError:
        return False
    return True


def _since(moves: list[Tensor]) -> list[Tensor | None]:
    """For a value recorded before each move, and after the last, which of its rows are there by now."""
    rows: list[Tensor | None] = [None]
    for move in reversed(moves):
        later = rows[0]
        rows.insert(0, move if later is None else move[later])
    return rows
