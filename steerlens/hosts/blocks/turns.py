"""What several threads of a process must do one after the other; travels to servers.

Locks are kept in a module of torch, where every copy of this code in the process finds the same ones: code that is sent
to a server cannot bring a lock along.
"""

from __future__ import annotations

from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.autograd import forward_ad


def forward_mode_turn() -> Any:
    """The lock to hold while a level of forward-mode differentiation is entered, of which a process has one."""
    return vars(forward_ad).setdefault("_steerlens_turn", RLock())


def turn_of(block: nn.Module) -> Any:
    """The lock of a model, by its first block: held while it is read, linearised or differentiated.

    Two threads that do so at once would see each other's hooks, swapped parameters or traces. Calls of the model by its
    user do not wait for it.
    """
    with forward_mode_turn():
        return vars(forward_ad).setdefault("_steerlens_turns", WeakKeyDictionary()).setdefault(block, RLock())
