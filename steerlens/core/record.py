"""What a run kept of its signals: a plain mapping from hook names to tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor


class Record(Mapping):
    """Signals of the latest sequence, `{"blocks.5.hook_steer_error": [batch pos], ...}`.

    One column per token of the sequence, in its order; a generation's columns are the prompt and every generated token
    that went through the model, whether or not a KV cache was used. A scalar is NaN, and a control zero, at tokens
    that were not steered.
    """

    def __init__(self) -> None:
        # one dict for good, so that a server can fill the very object that is sent to it and send it back
        self.pieces: dict[str, list[Tensor]] = {}

    def begin(self, *, fresh: bool, column: int) -> None:
        """A pass whose first token is the sequence's `column`-th begins."""
        if fresh or column == 0:  # a pass without a KV cache repeats the sequence from its start
            self.pieces.clear()

    def put(self, name: str, value: Tensor) -> None:
        """Keep one pass's values of one signal."""
        self.pieces.setdefault(name, []).append(value.detach())

    def __getitem__(self, name: str) -> Tensor:
        pieces = self.pieces[name]
        if len(pieces) == 1:
            return pieces[0]
        # a pass in which no token was selected does not know a signal's shape beyond batch and position
        trailing = max(pieces, key=lambda piece: piece.ndim).shape[2:]
        whole = [
            piece
            if piece.ndim == 2 + len(trailing)
            else piece.view(*piece.shape, *[1] * len(trailing)).expand(-1, -1, *trailing)
            for piece in pieces
        ]
        return torch.cat(whole, dim=1)

    def __iter__(self) -> Iterator[str]:
        return iter(self.pieces)

    def __len__(self) -> int:
        return len(self.pieces)

    def __repr__(self) -> str:
        shapes = {tuple(self[name].shape) for name in self}
        return f"Record({len(self)} signals, shapes {sorted(shapes)})"

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

    def copy(self) -> Record:
        """A record that later passes do not change."""
        copy = Record()
        copy.pieces.update({name: [self[name].clone()] for name in self})
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
                record.pieces[name] = [value]
        except ValueError as error:
            raise ValueError(f"{path} was not loaded: {error}") from None
        return record
