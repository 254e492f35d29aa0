"""What is attached to a model: one object per model, found from the model, which it does not keep alive."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock, get_ident
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from torch import Tensor

from steerlens.hosts.caches import Generation, Identity, Mark

if TYPE_CHECKING:
    from steerlens.hosts.attachment import Attachment

#: Attribute of a model that is steered.
_NAME = "_steerlens"
_NOTHING = object()


class Wrapped:
    """A function in the place of a method of one object, from when it is installed until it is removed.

    Args:
        owner: The object.
        name: Of the method.
        around: Is called with the method and its arguments.
    """

    def __init__(self, owner: Any, name: str, around: Callable[..., Any]):
        self.around = around
        self.name = name
        self._owner = weakref.ref(owner)

    def install(self) -> None:
        """Take the method's place."""
        owner = self._owner()
        assert owner is not None
        self.inner = getattr(owner, self.name)
        self._before = owner.__dict__.get(self.name, _NOTHING)
        functools.update_wrapper(self, self.inner, updated=())
        owner.__dict__[self.name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """In the place of the method."""
        return self.around(self.inner, *args, **kwargs)

    def remove(self) -> None:
        """Put the method back; where somebody has wrapped this one, pass calls on from now on."""
        owner = self._owner()
        if owner is not None and owner.__dict__.get(self.name) is self:
            if self._before is _NOTHING:
                del owner.__dict__[self.name]
            else:
                owner.__dict__[self.name] = self._before
        self.around = _plainly

    def strip(self, memo: dict[int, Any]) -> None:
        """Off a copy of the object."""
        twin = memo.get(id(self._owner()))
        if twin is not None:
            vars(twin).pop(self.name, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Wrapped:
        return self


def _plainly(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return inner(*args, **kwargs)


class Steered:
    """What is attached to one model, in which order, and the passes and generations that run through it.

    Passes of several threads go through a steered model one after another.
    """

    def __init__(self, model: Any):
        self._model = weakref.ref(model)
        self.attached: list[Attachment] = []
        #: See `Tap.visit`; one for all edits of an nnsight model.
        self.carried: dict[int, Tensor] = {}
        #: What lets remote calls of an nnsight model bring records back, see `RemoteForms`.
        self.forms: Any = None
        self.marks: WeakSet[Mark] = WeakSet()
        self.wraps: list[Any] = []
        self.lock = RLock()
        self.resting = self.copying = 0
        #: Calls of a model whose pass begins in their midst.
        self.expected: list[dict[str, Any]] = []
        #: Of the pass that is running, on nnsight, whose edits begin it.
        self.present: Any = None
        self._depth = 0
        self._generations: dict[int, list[Generation]] = {}
        self._padding: dict[int, Callable[[Tensor], Tensor]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # a model that is sent to a server goes without what is attached to it here; its edits travel by themselves
        return type(None), ()

    @classmethod
    def of(cls, model: Any) -> Steered | None:
        """What is attached to a model, None if nothing is."""
        return vars(model).get(_NAME)

    @classmethod
    def attach(cls, model: Any, attachment: Attachment, wraps: Callable[[Steered], list[Any]]) -> Steered:
        """Add to what is attached to a model; the first one wraps its methods."""
        steered = cls.of(model)
        if steered is None:
            steered = vars(model)[_NAME] = cls(model)
        steered.attached.append(attachment)
        if not steered.wraps:
            # known before any of them is installed: an interrupt in between leaves none behind
            steered.wraps = [PlainCopy(steered, model), *wraps(steered)]
            for wrapped in steered.wraps:
                wrapped.install()
        return steered

    def leave(self, attachment: Attachment) -> None:
        """Take one off; the last one leaves nothing behind. A second call does nothing."""
        self.attached = [other for other in self.attached if other is not attachment]
        if self.attached:
            return
        for wrapped in reversed(self.wraps):
            wrapped.remove()
        self.wraps = []
        for mark in list(self.marks):
            mark.remove()
        model = self._model()
        if model is not None and vars(model).get(_NAME) is self:
            del vars(model)[_NAME]

    @property
    def alone(self) -> bool:
        """Whether one run steers the model, and no other."""
        return len(self.attached) == 1

    @property
    def inside(self) -> bool:
        """Whether a forward pass is running."""
        return self._depth > 0

    # -- passes -------------------------------------------------------------------------------------------------

    @contextmanager
    def passing(self) -> Iterator[Callable[..., Identity] | None]:
        """A forward pass of this thread; gives what begins it, see `begin`, or None while the runs stand down."""
        with self.lock:
            if self.resting or not self.attached:
                yield None
                return
            held = [(attachment.run, attachment.run.hold()) for attachment in self.attached]
            self._depth += 1
            try:
                yield self.begin
            finally:
                self._depth -= 1
                for run, fields in held:
                    run.resume(fields)

    def begin(
        self,
        shape: tuple[int, int],
        *,
        past: Any,
        mask: Tensor | None,
        device: Any,
        cache: Any = None,
        tokens: Tensor | None = None,
        companion: Any = None,
    ) -> Identity:
        """Begin a pass for all runs.

        Args:
            shape, mask, device, companion: As in `Pass.begin`.
            past: Columns in the cache, a number or a tensor on the model's device.
            cache: The object that identifies the sequence; None: there is none, or the pass makes one, see `bind`.
            tokens: What goes in, `[batch pos ...]`.

        Returns:
            Of the sequence.
        """
        identity, options, fresh = self.identify(shape, past=past, mask=mask, cache=cache, tokens=tokens)
        for attachment in reversed(self.attached):
            attachment.ready()
        for attachment in self.attached:
            run = attachment.run
            sequence = identity.of(run, fresh=fresh)
            beside = {"companion": companion, "tokens": tokens, "alone": self.alone}
            run.begin(shape, device=device, sequence=sequence, **beside, **options)
        return identity

    def identify(
        self, shape: tuple[int, int], *, past: Any, mask: Tensor | None, cache: Any, tokens: Tensor | None
    ) -> tuple[Identity, dict[str, Any], bool]:
        """Which sequence a pass belongs to, what `Pass.begin` needs to know beside, and whether the sequence begins."""
        generation, nested = self.generation, self._depth > 1
        own = generation is not None and not nested and generation.claims(cache, tokens, self.marks)
        identity = self._identify(cache, tokens, generation, own)
        if isinstance(past, Tensor):
            # of a static cache; to look at it would wait for the device
            known = next(iter(identity.held.values()), None)
            past = int(past) if known is None or not known.positions.seen else known.positions.seen
            if past < 0:
                raise RuntimeError(
                    "the recurrent cache of this pass was filled before the model was steered, and does not count its "
                    "tokens; begin with an empty one"
                )
        end = None
        if generation is not None and own:
            if generation.end is None:
                generation.end = past + shape[1]
            end = generation.end
            mask = generation.mask if generation.announced else mask
        shown = not nested and (own or generation is None)
        # a pass in a generation without a cache repeats its sequence, if that has begun
        repeats = cache is None and generation is not None and (own or identity.end is not None)
        if cache is None and generation is not None and not own:
            end, identity.end = identity.end, identity.end or past + shape[1]
        fresh = past == 0 and not repeats
        return identity, {"past": past, "mask": mask, "end": end, "shown": shown}, fresh

    def _identify(self, cache: Any, tokens: Tensor | None, generation: Generation | None, own: bool) -> Identity:
        if cache is not None:
            identity: Identity = Mark.of_cache(cache, self.marks)
        elif generation is None:
            return Identity()
        elif not own:
            return generation.other(tokens)
        else:
            identity = Identity() if generation.identity is None else generation.identity
            identity.tokens = tokens
        if own and generation is not None:
            generation.identity = identity
        return identity

    def bind(self, identity: Identity, cache: Any) -> None:
        """The pass has made a cache: whatever continues it continues the sequence."""
        if hasattr(cache, "__dict__"):
            Mark(cache, self.marks, identity.held)

    @contextmanager
    def padding(self, mask: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """A call in this thread whose tokens the library pads by itself without a mask; `mask` tells them apart."""
        here = get_ident()
        self._padding[here] = mask
        try:
            yield
        finally:
            self._padding.pop(here, None)

    def pads(self, tokens: Tensor) -> Tensor | None:
        """The mask of a pass that came without one, None if the library has not padded it."""
        mask = self._padding.get(get_ident())
        return None if mask is None or self._depth > 1 else mask(tokens)

    # -- generations --------------------------------------------------------------------------------------------

    @contextmanager
    def generating(self, generation: Generation) -> Iterator[Generation]:
        """A call of `generate` in this thread."""
        here = get_ident()
        calls = self._generations.setdefault(here, [])
        calls.append(generation)
        try:
            yield generation
        finally:
            calls.remove(generation)
            if not calls:
                self._generations.pop(here, None)

    @property
    def generation(self) -> Generation | None:
        """The innermost call of `generate` in this thread."""
        calls = self._generations.get(get_ident())
        return calls[-1] if calls else None

    def stream(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[Any]:
        """A generator that generates: it runs in between what it yields."""
        generation, steps = Generation(), inner(*args, **kwargs)
        while True:
            with self.generating(generation):
                try:
                    value = next(steps)
                except StopIteration:
                    return
            yield value

    # -- standing down ------------------------------------------------------------------------------------------

    @contextmanager
    def standing_down(self) -> Iterator[None]:
        """The model as it is unsteered, for this thread; others wait."""
        with self.lock:
            self.resting += 1
            stops = [(attachment.run, attachment.run.rest()) for attachment in self.attached]
            try:
                yield
            finally:
                self.resting -= 1
                for run, held in stops:
                    run.wake(held)


@contextmanager
def unsteered(model: Any) -> Iterator[None]:
    """A model as it is without what is attached to it."""
    steered = Steered.of(model)
    if steered is None:
        yield
        return
    with steered.standing_down():
        yield


class PlainCopy:
    """Makes deep copies of a steered model plain ones, which no run steers.

    Args:
        model: The model, or a part of it that may be copied by itself.
    """

    def __init__(self, steered: Steered, model: Any):
        self._steered = steered
        self._model = weakref.ref(model)

    def install(self) -> None:
        """Make the next deep copy plain."""
        model = self._model()
        assert model is not None
        vars(model)["__deepcopy__"] = self

    def __call__(self, memo: dict[int, Any]) -> Any:
        """In the place of `__deepcopy__`."""
        model, steered = self._model(), self._steered
        with steered.lock:
            held = {name: vars(model).pop(name) for name in (_NAME, "__deepcopy__") if name in vars(model)}
            steered.copying += 1
            try:
                # not deepcopy(): a Bridge without the attribute would give that of the model inside
                twin = copy._reconstruct(model, memo, *model.__reduce_ex__(4))  # type: ignore[attr-defined]
            finally:
                steered.copying -= 1
                vars(model).update(held)
            if steered.copying:  # a part of a model that is being copied
                return twin
            for attachment in steered.attached:
                attachment.strip(lambda part: memo.get(id(part)))
            for wrapped in steered.wraps:
                wrapped.strip(memo)
        return twin

    def strip(self, memo: dict[int, Any]) -> None:
        """Off a copy."""
        twin = memo.get(id(self._model()))
        if twin is not None:
            vars(twin).pop("__deepcopy__", None)

    def remove(self) -> None:
        """Let copies be made as before."""
        model = self._model()
        if model is not None and vars(model).get("__deepcopy__") is self:
            del vars(model)["__deepcopy__"]

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()
