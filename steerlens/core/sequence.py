"""A sequence: what shares a KV cache, and all that one run must remember for as long as it lasts."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from steerlens.core.memory import Memory
from steerlens.core.positions import Positions
from steerlens.core.record import blank, cut

#: So many passes a sequence can be taken back with what its laws remember.
_REMEMBERED = 16


class Sequence:
    """Tokens that go through the model one pass after another and see each other: a text, a generation, a chat.

    Attributes:
        positions: Of its tokens, and where its prompt ends.
        store: Its signals, see `record.blank`.
        memory: By group of loops, what their laws remember until the sequence ends: `now.sequence`. A tensor in it is
            `[batch pos ...]`, one value for each token that the law saw in the latest pass, or `[batch ...]`.
        wheres: By group of loops, the tokens that they act on.
        states: By site, what summaries of the prompt are made of, `[batch pos ...]` of each pass.
        pooled: The summaries, by their id.
        decisions: Of gates.
        kept: What a companion keeps for later passes, anything with `rows` and `cut`.
        tangents: Of the present pass.
        references: Of the present pass: by site, the unsteered state of its tokens, `[batch pos ...]`.
    """

    def __init__(self) -> None:
        self.positions = Positions()
        self.store = blank()
        self.memory: dict[int, Memory] = {}
        self.wheres: dict[int, list[Any]] = {}
        self.states: dict[Any, list[Tensor]] = {}
        self.pooled: dict[int, Tensor] = {}
        self.decisions: dict[Any, tuple[Tensor, dict[str, Tensor]]] = {}
        self.kept: dict[Any, Any] = {}
        self.tangents: dict[Any, Tensor] = {}
        self.references: dict[Any, Tensor] = {}
        self._before: list[tuple[int, dict[int, Memory]]] = []

    def begin(self, shape: tuple[int, int], past: int, mask: Tensor | None, **options: Any) -> None:
        """Enter a pass; arguments as in `Positions.begin`."""
        if past < self.positions.seen:
            self.cut(past)
        if self.positions.begin(shape, past, mask, **options):
            self.pooled.clear()
            self.decisions.clear()
        self.store["length"] = past + shape[1]
        self._before = self._before[1 - _REMEMBERED :]
        held = {group: kept.fork() for group, kept in self.memory.items() if kept.together or kept.rows or kept.lost}
        self._before.append((past, held))

    def cut(self, column: int) -> None:
        """The cache has lost the columns from this one on."""
        seen = self.positions.seen
        if column >= seen:
            return
        cut(self.store, column)
        self._remember(column, seen)
        self.positions.cut(column)
        for site, pieces in self.states.items():
            self.states[site] = _columns(pieces, column)
        for kept in self.kept.values():
            kept.cut(column)

    def rows(self, index: Tensor) -> None:
        """The cache has other rows by now, `[new batch]` numbers of those that were there."""
        self.store["moves"].append(index)
        self.positions.rows(index)
        for name, value in self.pooled.items():
            self.pooled[name] = _pick(value, index)
        for memories in (self.memory, *(before for _, before in self._before)):
            for memory in memories.values():
                memory.pick(index)
        for site, pieces in self.states.items():
            self.states[site] = [_pick(value, index) for value in pieces]
        for key, (decided, measured) in self.decisions.items():
            self.decisions[key] = (
                _pick(decided, index),
                {name: _pick(value, index) for name, value in measured.items()},
            )
        for kept in self.kept.values():
            kept.rows(index)

    def fork(self) -> Sequence:
        """A sequence with the same past, for a copy of the cache."""
        twin = Sequence()
        twin.positions.__dict__.update(self.positions.__dict__)
        twin.store = {
            "pieces": {name: list(pieces) for name, pieces in self.store["pieces"].items()},
            "moves": list(self.store["moves"]),
            "length": self.store["length"],
        }
        twin.memory = {group: memory.fork() for group, memory in self.memory.items()}
        twin._before = [(past, {group: memory.fork() for group, memory in old.items()}) for past, old in self._before]
        twin.wheres = self.wheres
        twin.states = {site: list(pieces) for site, pieces in self.states.items()}
        twin.pooled, twin.decisions = dict(self.pooled), dict(self.decisions)
        twin.kept = {key: kept.fork() for key, kept in self.kept.items()}
        return twin

    def _remember(self, column: int, seen: int) -> None:
        """Go back to what laws knew at a column: to the pass that ended there, or to a part of the latest."""
        while self._before and self._before[-1][0] > column:
            seen, self.memory = self._before.pop()
        if self._before and self._before[-1][0] == column:
            self.memory = self._before.pop()[1]
        elif column == 0:
            self.memory = {}
        elif self._before:
            past, old = self._before[-1]
            part = self.positions.part(past, seen)
            for group, memory in self.memory.items():
                wheres = self.wheres.get(group, [])
                chosen = part.select(wheres[0]) if len(wheres) == 1 else slice(0, seen - past)
                memory.cut(old.get(group) or Memory(), chosen, column - past)
        else:  # longer ago than is remembered
            for memory in self.memory.values():
                memory.lost = bool(memory.together or memory.rows)


def _columns(pieces: list[Tensor], column: int) -> list[Tensor]:
    """The values of the columns before this one."""
    left = []
    for piece in pieces:
        if column <= 0:
            break
        left.append(piece[:, :column])
        column -= piece.shape[1]
    return left


def _pick(value: Any, index: Tensor) -> Any:
    return value[index.to(value.device)] if isinstance(value, Tensor) else value
