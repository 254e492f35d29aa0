"""Passes of an nnsight model whose weights are here, where caches and calls of `generate` can be told apart."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from steerlens.core import Pass
from steerlens.hosts.attachment import Attachment
from steerlens.hosts.blocks import hf
from steerlens.hosts.generation import hf_generations
from steerlens.hosts.steered import Steered
from steerlens.hosts.traced.edit import Passes


class KnownPasses(Passes):
    """Begins passes with what the model's own calls tell of them; on a server it is `Passes`."""

    def __init__(self, steered: Steered):
        self.steered = steered

    def begin(self, run: Pass, call: dict[str, Any], step: int, **options: Any) -> None:
        """See `Passes.begin`."""
        identity, known, fresh, rows = self.steered.present
        if rows != call["shape"][0]:  # of one invoke of several, which share caches and calls
            Passes.begin(self, run, call, step, **options)
            return
        sequence = identity.of(run, fresh=fresh)
        known = {**known, **options, "tokens": call["tokens"]}
        run.begin(call["shape"], device=call["device"], sequence=sequence, **known)

    def __reduce__(self) -> tuple[Any, ...]:
        return Passes, ()


class _Application(Attachment):
    """A run of `apply`, attached for as long as its trace lasts."""

    def __init__(self, run: Pass):
        self.run = run


def applying(host: Any, run: Pass) -> tuple[Passes, Callable[[], None]]:
    """What begins the passes of a run of `apply` where the weights are, and what to call at their end."""
    if host.away:
        return Passes(), _nothing
    attachment = _Application(run)
    steered = Steered.attach(host.model, attachment, host.wraps)
    return KnownPasses(steered), partial(steered.leave, attachment)


def _nothing() -> None:
    pass


def wraps(base: nn.Module, model: nn.Module, interleaver: Any, steered: Steered) -> list[Any]:
    """Around a Hugging Face model behind nnsight, see `Steered.attach`.

    Hooks on the base model and not its `forward`, which nnsight has wrapped: it warns of anybody who does so after it.

    Upstream: nnsight (0.8.1) does not tell an edit which call of `generate` a pass belongs to; goes when it does.
    """

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if interleaver.interleaving:
            call = hf.call_shape(args, kwargs)
            shape, _ = call.pop("shape"), call.pop("device")
            steered.present = (*steered.identify(shape, **call), shape[0])

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        usual, recurrent = hf.CACHES
        if interleaver.interleaving and kwargs.get(usual) is None and kwargs.get(recurrent) is None:
            made = hf.made_cache(output)
            if made is not None:
                steered.bind(steered.present[0], made)

    hooks = [
        _Hook(lambda: base.register_forward_pre_hook(enter, with_kwargs=True)),
        _Hook(lambda: base.register_forward_hook(leave, with_kwargs=True)),
    ]
    return [*hooks, *hf_generations(steered, model, whole=True)]


class _Hook:
    """A hook of PyTorch, as something to install and to remove."""

    def __init__(self, register: Callable[[], Any]):
        self._register = register
        self._handle: Any = None

    def install(self) -> None:
        """Register it."""
        self._handle = self._register()

    def remove(self) -> None:
        """Take it off, if it is on."""
        if self._handle is not None:
            self._handle.remove()

    def strip(self, memo: dict[int, Any]) -> None:
        """A copy of an nnsight model has no hooks of this one."""
