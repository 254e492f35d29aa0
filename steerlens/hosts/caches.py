"""What tells sequences apart: the KV cache a pass writes, or the call of `generate` that it serves."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from steerlens.core import Pass, Sequence

#: Attribute of a cache that belongs to a sequence.
_MARK = "_steerlens_mark"


class Identity:
    """One sequence as the model sees it.

    Attributes:
        held: What each run that steers the model knows of it.
        tokens: Of the latest pass, if there is no cache.
        end: First column after its prompt, if it is decoded beside a generation without a cache.
    """

    def __init__(self, tokens: Tensor | None = None):
        self.held: WeakKeyDictionary[Pass, Sequence] = WeakKeyDictionary()
        self.tokens = tokens
        self.end: int | None = None

    def of(self, run: Pass, *, fresh: bool) -> Sequence:
        """The sequence as a run knows it; `fresh`: it begins."""
        sequence = self.held.get(run)
        if sequence is None or fresh:
            sequence = self.held[run] = Sequence()
        return sequence

    def continued_by(self, tokens: Tensor | None) -> bool:
        """Whether a pass without a cache repeats this one's tokens and adds one."""
        mine = self.tokens
        if mine is None or tokens is None or tokens.shape[:1] != mine.shape[:1]:
            return False
        return tokens.shape[1] == mine.shape[1] + 1 and torch.equal(tokens[:, :-1], mine)


class Mark(Identity):
    """The identity of a sequence that has a cache, kept on the cache itself.

    It lives as long as the cache, and a deep copy of the cache gets one of its own with the same past. The cache's
    methods that move rows or drop columns are followed; neither library announces them (a hook in
    `transformers.cache_utils.Cache` would make this unnecessary).
    """

    def __init__(self, cache: Any, marks: WeakSet[Mark], held: WeakKeyDictionary[Pass, Sequence] | None = None):
        Identity.__init__(self)
        if held is not None:
            self.held = held
        self.cache = weakref.ref(cache)
        self.marks = marks
        marks.add(self)
        cache.__dict__[_MARK] = self
        for name in _FOLLOWED:
            if hasattr(type(cache), name):
                cache.__dict__[name] = Following(self, name)

    @classmethod
    def of_cache(cls, cache: Any, marks: WeakSet[Mark]) -> Mark:
        """The mark of a cache, made if it has none."""
        mark = cache.__dict__.get(_MARK)
        return mark if isinstance(mark, Mark) else cls(cache, marks)

    def remove(self) -> None:
        """Take everything off the cache."""
        cache = self.cache()
        if cache is not None and cache.__dict__.get(_MARK) is self:
            for name in (_MARK, *_FOLLOWED):
                cache.__dict__.pop(name, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo.get(id(self.cache()))
        if twin is None:
            return None
        mark = Mark(twin, self.marks)
        for run, sequence in self.held.items():
            mark.held[run] = sequence.fork()
        return mark

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ()


class Following:
    """A method of a cache, which tells the sequences what it has done.

    Args:
        mark: Of the cache.
        name: Of the method.
    """

    def __init__(self, mark: Mark, name: str):
        self.mark = mark
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the cache's own."""
        cache = self.mark.cache()
        result = getattr(type(cache), self.name)(cache, *args, **kwargs)
        for sequence in self.mark.held.values():
            _FOLLOWED[self.name](sequence, cache, *args, **kwargs)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo.get(id(self.mark.cache()))
        mark = self.mark if twin is None else twin.__dict__.get(_MARK) or self.mark.__deepcopy__(memo)
        return Following(mark, self.name)

    def __reduce__(self) -> tuple[Any, ...]:
        cache = self.mark.cache()
        return _method, (type(cache), self.name, cache)


def _method(kind: type, name: str, cache: Any) -> Callable[..., Any]:
    return types.MethodType(getattr(kind, name), cache)


def _crop(sequence: Sequence, cache: Any, *_: Any, **__: Any) -> None:
    sequence.cut(int(cache.get_seq_length()))


def _reset(sequence: Sequence, cache: Any) -> None:
    sequence.cut(0)


def _reorder(sequence: Sequence, cache: Any, beam_idx: Tensor) -> None:
    sequence.rows(beam_idx)


def _repeat(sequence: Sequence, cache: Any, repeats: int) -> None:
    sequence.rows(torch.arange(sequence.positions.batch).repeat_interleave(repeats))


def _select(sequence: Sequence, cache: Any, indices: Any) -> None:
    index = torch.as_tensor(indices)
    sequence.rows(index.nonzero().flatten() if index.dtype == torch.bool else index)


_FOLLOWED: dict[str, Callable[..., None]] = {
    "crop": _crop,
    "reset": _reset,
    "reorder_cache": _reorder,
    "batch_repeat_interleave": _repeat,
    "batch_select_indices": _select,
}


class Generation:
    """One call of `generate`: which passes are its own, and where its prompt ends.

    Args:
        end: First column after the prompt; None: after the first pass of its own.
        announced: Its own passes are announced by `announce`; otherwise they are those that write the cache of the
            first one, or that repeat it and add a token.
    """

    def __init__(self, end: int | None = None, *, announced: bool = False):
        self.end = end
        self.announced = announced
        #: Of its own passes.
        self.identity: Identity | None = None
        self.mask: Tensor | None = None
        #: Ids of its tokens so far, if the library embeds them before each pass.
        self.embedded: Tensor | None = None
        self._next = False
        self._others: list[Identity] = []

    def announce(self, mask: Tensor | None) -> None:
        """The next pass is one of its own; its mask as it was before a cache changed its form."""
        self._next, self.mask = True, mask

    def claims(self, cache: Any, tokens: Tensor | None, marks: WeakSet[Mark]) -> bool:
        """Whether a pass is one of its own."""
        if self.announced:
            own, self._next = self._next, False
            return own
        if self.identity is None:
            return True
        if cache is not None:
            return Mark.of_cache(cache, marks).held is self.identity.held
        return self.identity.continued_by(tokens)

    def other(self, tokens: Tensor | None) -> Identity:
        """The identity of a pass without a cache that is not its own, such as those of guidance."""
        for identity in self._others:
            if identity.continued_by(tokens):
                identity.tokens = tokens
                return identity
        identity = Identity(tokens)
        # one for each text that is decoded beside the generation; four are plenty
        self._others = [*self._others[-3:], identity]
        return identity
