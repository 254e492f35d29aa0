"""Tokens that the text itself names: after a marker, until one, between two. A finite automaton over token ids."""

from __future__ import annotations

import torch
from torch import Tensor

from steerlens.core.part import Part


class Span(Part):
    """Which tokens lie in a part of the text, told by the ids alone, one token after the other.

        state <- table[row of the token, state]   for the tokens in `ids`,   state <- default[state]   for all others

    Made by `after`, `until`, `between` and `assistant`, which know the text of every token: a state is how much of a
    marker has been read, so that it does not matter into which tokens the marker was split. It begins at state 0.

    Args:
        words: How it was made, for people.
        ids: `[k]`, in rising order.
        table: `[k state]`, integers.
        default: `[state]`, integers.
        inside: `[state]`, bool: whether the token that led there is one of the part.
    """

    words: str

    def __init__(self, words: str, ids: Tensor, table: Tensor, default: Tensor, inside: Tensor):
        self.words = words
        self.ids = ids
        self.table = table
        self.default = default
        self.inside = inside
        self.validate()

    def validate(self) -> None:
        """Shapes fit, ids rise, and every state is one that there is."""
        count = len(self.default)
        shapes = (self.ids.ndim, self.default.ndim, tuple(self.table.shape), tuple(self.inside.shape))
        if shapes != (1, 1, (len(self.ids), count), (count,)) or not (len(self.ids) and count):
            raise ValueError(f"the tensors of {self.words} do not fit together")
        whole = [not tensor.is_floating_point() for tensor in (self.ids, self.table, self.default)]
        if not all(whole) or self.inside.dtype != torch.bool:
            raise ValueError(f"{self.words} has ids, states or flags that are none")
        if self.ids.is_meta:
            return
        states = torch.cat([self.table.flatten(), self.default])
        if bool((states < 0).any() | (states >= count).any() | (self.ids.diff() <= 0).any()):
            raise ValueError(f"{self.words} leads to states that it lacks, or its ids do not rise")

    def same(self, other: Span) -> bool:
        """Whether another one names the same tokens."""
        if self.table.shape != other.table.shape or self.words != other.words:
            return False
        names = ("ids", "table", "default", "inside")
        return all(torch.equal(getattr(self, name), getattr(other, name)) for name in names)

    def states(self, tokens: Tensor, real: Tensor | None, before: Tensor | None) -> Tensor:
        """The state after each token, `[batch pos] -> [batch pos]`; pads change nothing.

        Args:
            tokens: Ids; the part's tensors are on their device.
            real: Which are no pads, `[batch pos]`; None: all.
            before: The state after the token before them, `[batch]`; None: they begin the text.
        """
        place = torch.searchsorted(self.ids, tokens.contiguous()).clamp(max=len(self.ids) - 1)
        known = self.ids[place] == tokens
        state = torch.zeros_like(tokens[:, 0]) if before is None else before
        found = []
        for column in range(tokens.shape[1]):
            there = self.table[place[:, column], state].to(state)
            after = torch.where(known[:, column], there, self.default[state].to(state))
            state = after if real is None else torch.where(real[:, column], after, state)
            found.append(state)
        return torch.stack(found, dim=1)

    def __repr__(self) -> str:
        return self.words
