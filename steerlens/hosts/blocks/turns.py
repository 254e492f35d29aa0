"""Threads that fit on one model take turns."""

from __future__ import annotations

from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_MAKING = Lock()


def turn_of(block: nn.Module) -> Any:
    """The lock of a model, by its first block: held while it is read, linearised or differentiated.

    Two threads that do so at once would see each other's hooks, swapped parameters or traces. Calls of the model by its
    user do not wait for it.
    """
    with _MAKING:
        return _LOCKS.setdefault(block, RLock())
