"""A module without its hooks for a while; sent to servers by source, so it names no module of ours."""

from __future__ import annotations

from typing import Any

from torch import nn


class Bare:
    """A context in which a module and all in it have no hooks.

    Upstream: neither torch nor TransformerLens can suspend hooks for a while, permanent ones among them.
    """

    def __init__(self, module: nn.Module):
        self.module = module

    def __enter__(self) -> None:
        self._held: list[tuple[dict[str, Any], dict[str, Any]]] = []
        try:
            self._take_all()
        except BaseException:  # an interrupt: __exit__ would not be called
            self.__exit__()
            raise

    def _take_all(self) -> None:
        # a walk of our own: every token comes by, and modules() calls itself once for each ancestor of each module
        waiting, seen = [self.module], {self.module}
        while waiting:
            fields = waiting.pop().__dict__
            if fields["_forward_hooks"] or fields["_forward_pre_hooks"]:
                hooks: dict[str, Any] = {}
                self._held.append((fields, hooks))
                for name in _HOOKS:
                    hooks[name] = held = fields[name]
                    # a handle removes itself from the very dict that it was put into: put others in their place
                    fields[name] = type(held)()
            for part in fields["_modules"].values():
                if part is not None and part not in seen:
                    seen.add(part)
                    waiting.append(part)

    def __exit__(self, *_: Any) -> None:
        for fields, hooks in self._held:
            fields.update(hooks)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
