"""Where a function of ours meets a state of a TransformerLens model: a hook point, or an SAE in its place.

sae-lens splices an SAE in by *replacing* the hook point, and takes it out by putting a new hook point there. Hooks on
the old one then never fire again. A seat therefore knows its place by name and moves to whatever stands there.

Upstream: sae-lens (6.54) has no hook point that stays when an SAE comes or goes; with one, `Seat.follow` goes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from steerlens.hosts.blocks.graph import Place

#: From the state `[batch pos ...]` to a new one, or None to leave it.
Change = Callable[[Tensor], Tensor | None]


def spliced(module: Any) -> bool:
    """Whether sae-lens has put an SAE or a transcoder here; told without importing it."""
    return isinstance(getattr(module, "hook_sae_output", None), HookPoint)


def outlet(module: nn.Module) -> nn.Module:
    """The hook point whose value flows on from here."""
    return module.hook_sae_output if spliced(module) else module  # type: ignore[return-value]


def transcodes(module: Any) -> bool:
    """Whether what is spliced in here reads another place than it writes."""
    metadata = module.sae.cfg.metadata
    return metadata.hook_name_out not in (None, metadata.hook_name)


def place_of(module: nn.Module) -> Place:
    """Where the state that a seat's function gets can be read without one."""
    spliced_in = spliced(module) and not transcodes(module)
    return (module, "input") if spliced_in else (outlet(module), "output")


class Seat:
    """One function at one place of the model.

    At a hook point it is a permanent hook, which `reset_hooks()` leaves alone. Where an SAE is spliced in, the function
    gets the SAE's *input*: what it adds shows in the feature activations and reaches the model as far as the SAE passes
    it on, wholly with the error term. What a transcoder puts out does not depend on what would have been here, so there
    the function gets its *output*.

    Args:
        find: Gives the module that stands at the place, hook point or SAE.
        change: The function.
        shape: Shape of the state without batch and position, into which it is unfolded where TransformerLens has
            flattened heads.
        rows: Gives the number of rows in the batch, for modules that are given batch and position as one dimension.
        outgoing: Take what flows on from here, also behind an SAE.
        last: The function only looks, and is to see what all hooks that change the state leave.
    """

    def __init__(
        self,
        find: Callable[[], nn.Module | None],
        change: Change,
        shape: tuple[int, ...],
        rows: Callable[[], int],
        *,
        outgoing: bool = False,
        last: bool = False,
    ):
        self._find = find
        self._change = change
        self._shape = shape
        self._rows = rows
        self._outgoing = outgoing
        self._last = last
        self._remove: Callable[[], None] | None = None
        self._there: Callable[[], bool] = lambda: False
        self.module: nn.Module | None = None

    def take(self, *, first: bool = False) -> None:
        """Install the function, before all hooks that are there already with `first`."""
        self.module = self._find()
        assert self.module is not None
        if not spliced(self.module) or self._outgoing or transcodes(self.module):
            point = outlet(self.module)
            assert isinstance(point, HookPoint)
            # what removes it is there before the hook is: an interrupt in between leaves nothing behind
            self._remove, self._there = partial(_take_hook, point, self._hook), partial(_has_hook, point, self._hook)
            point.add_hook(self._hook, is_permanent=True, prepend=first)
        else:
            self._remove = partial(_take_pre_hook, self.module, self._enter)
            self.module.register_forward_pre_hook(self._enter, prepend=first)
            self._there = lambda: True

    def follow(self) -> bool:
        """Move, if something else stands at the place than before, or the hook was taken off; True where it was so."""
        now = self._find()
        if now is None or (now is self.module and self._there() and not (self._last and self._passed())):
            return False
        self.leave()
        self.take(first=not self._last)
        return True

    def _passed(self) -> bool:
        """Whether a hook that may change the state comes behind this one."""
        for handle in reversed(outlet(self.module).fwd_hooks):  # type: ignore[arg-type]
            seat = getattr(handle.user_hook, "__self__", None)
            if not (isinstance(seat, Seat) and seat._last):
                return True
            if seat is self:
                return False
        return True

    def leave(self) -> None:
        """Take the function off; a second call does nothing."""
        if self._remove is not None:
            self._remove()
        self._remove, self._there, self.module = None, lambda: False, None

    def strip(self, find: Callable[[Any], Any]) -> None:
        """Take the function off a copy of the model; `find` gives the copy of a part, or None."""
        for part in (self.module, None if self.module is None else outlet(self.module)):
            twin = find(part)
            if isinstance(twin, HookPoint):
                _take_hook(twin, self._hook)
            if twin is not None:
                _take_pre_hook(twin, self._enter)

    def __deepcopy__(self, memo: dict[int, Any]) -> Seat:
        return self

    def _hook(self, x: Tensor, hook: Any) -> Tensor | None:
        return self._act(x)

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        changed = self._act(args[0])
        return None if changed is None else (changed, *args[1:])

    def _act(self, x: Tensor) -> Tensor | None:
        if x.ndim == 2:
            changed = self._change(x.unflatten(0, (self._rows(), -1)))
            return None if changed is None else changed.flatten(0, 1)
        # a Bridge's hook point unfolds heads, for DeepSeek into others than there are; neither an SAE nor the hook
        # point that it leaves behind does
        if len(self._shape) == 1 or x.shape[2:] == self._shape:
            return self._change(x)
        changed = self._change(x.flatten(2).unflatten(-1, self._shape))
        return None if changed is None else changed.reshape(x.shape)


def _take_hook(point: HookPoint, hook: Any) -> None:
    """Remove a hook of ours from a hook point, and no other."""
    for handle in [handle for handle in point.fwd_hooks if handle.user_hook == hook]:
        handle.hook.remove()
        point.fwd_hooks.remove(handle)


def _has_hook(point: HookPoint, hook: Any) -> bool:
    """Whether it is still there: taking a transcoder off takes all hooks of the hook point that it has read."""
    # a loop and no generator, which every token would resume twice at every site
    for handle in point.fwd_hooks:  # noqa: SIM110 (see above)
        if handle.user_hook == hook and handle.hook.id in point._forward_hooks:
            return True
    return False


def _take_pre_hook(module: nn.Module, hook: Any) -> None:
    for key in [key for key, held in module._forward_pre_hooks.items() if held == hook]:
        module._forward_pre_hooks.pop(key, None)
        module._forward_pre_hooks_with_kwargs.pop(key, None)
