"""A Hugging Face model beside a steered pass: its unsteered states, and how they change with its parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from steerlens.core import Companion, Direction, Site
from steerlens.hosts.blocks.attention import PlainAttention
from steerlens.hosts.blocks.graph import watch
from steerlens.hosts.blocks.hf import plain_mask
from steerlens.hosts.blocks.text import text_of
from steerlens.hosts.blocks.turns import forward_mode_turn

#: A module, whether the state is its `"input"` or its `"output"`, into how many heads it is to be split (0: none), and
#: by what it is to be multiplied.
Spot = tuple[nn.Module, str, int, float]


class SecondPass:
    """A Hugging Face base model that is run beside a steered pass; made once for a host.

    Args:
        base: The base model.
        aside: Makes a context in which a call of `base` is plain: neither steered nor seen by hooks.
        spots: Where each site's state is.
    """

    def __init__(
        self,
        base: nn.Module,
        aside: Callable[[], Any],
        spots: Callable[[Sequence[Site]], dict[Site, Spot]],
    ):
        self.base = base
        self.aside = aside
        self.spots = spots

    def run(
        self, sites: Sequence[Site], call: Call, changed: dict[str, Tensor] | None = None, track: _Kept | None = None
    ) -> dict[Site, Tensor]:
        """States in a pass over the tokens of a call.

        Args:
            changed: Parameters to use instead of the model's, by name.
            track: The KV cache to go on with; None: without one.
        """
        args, kwargs = call.again()
        kwargs["use_cache"] = track is not None
        if track is not None:
            kwargs["past_key_values"] = track.cache(self.base)

        def forward() -> Any:
            if changed:
                return functional_call(self.base, changed, args, kwargs, tie_weights=False)
            return self.base(*args, **kwargs)

        found = gather(self.spots(sites), forward, call.rows)
        if track is not None:
            track.keep()
        return found

    def along(self, direction: Direction) -> list[tuple[list[str], Tensor, Tensor]]:
        """Places, value and change of every parameter that a direction has."""
        parameters, places = named_parameters(self.base), everywhere(self.base)
        for name, value in zip(direction.names, direction.values, strict=True):
            if name not in parameters or parameters[name].shape != value.shape:
                raise ValueError(
                    f"the model has no parameter {name!r} of shape {list(value.shape)}, of which the controller holds "
                    "a gradient; fit it on this model"
                )
        return [
            (places[id(parameters[name])], parameters[name].detach(), value.to(parameters[name]))
            for name, value in zip(direction.names, direction.values, strict=True)
        ]


class Call:
    """The arguments of the call that is being steered.

    Args:
        args, kwargs: Of the call; a KV cache among them is neither read nor written.
        past: Number of tokens that it holds.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], past: int):
        self.args = args
        self.kwargs = kwargs
        self.past = past

    @property
    def rows(self) -> int:
        """Number of rows of the batch."""
        given = next(value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor))
        return given.shape[0]

    @property
    def tokens(self) -> tuple[str, Tensor]:
        """What the call reads, ids or embeddings, and the argument's name."""
        for name in ("input_ids", "inputs_embeds"):
            if self.kwargs.get(name) is not None:
                return name, self.kwargs[name]
        return "input_ids", self.args[0]

    def again(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Copies without what a pass of its own settles by itself."""
        settled = ("past_key_values", "use_cache", "return_dict")
        own = {name: self._short(value) for name, value in self.kwargs.items() if name not in settled}
        return _fresh(self.args), {name: _fresh(value) for name, value in own.items()}

    def _short(self, value: Any) -> Any:
        """A mask for a static cache, whose keys are as many as fit into it, as one for the tokens that there are."""
        if isinstance(value, dict):
            return {name: self._short(entry) for name, entry in value.items()}
        if isinstance(value, Tensor) and value.ndim == 4:
            return value[..., : self.past + value.shape[2]]
        return value


class BaseCompanion(Companion):
    """A second pass beside one call of a Hugging Face base model; made for each call.

    Args:
        second: Runs the model.
        call: What is being steered.
        kept: What earlier passes of the sequence left: by direction the KV caches of its own, and their tokens.
    """

    def __init__(self, second: SecondPass, call: Call, kept: dict[Any, Any]):
        self.second = second
        self.call = call
        self.kept = kept

    def states(self, sites: Sequence[Site], *, goes_on: bool) -> dict[Site, Tensor]:
        """The unsteered states of the call's tokens; with a KV cache of their own if the sequence goes on.

        If that cache lacks what came before, as the answers of a chat, they are those of the whole text, read at once.
        """
        past = self.call.past
        if past == 0 and goes_on:
            self.kept["states"] = Tracks()
        tracks = self.kept.get("states")
        if tracks is not None and tracks.length == past and (past or goes_on):
            with self.second.aside(), torch.inference_mode(False), torch.no_grad():
                return self.second.run(sites, self.call, track=tracks.sides[0])
        call = self._whole() if past else self.call
        with self.second.aside(), torch.no_grad():
            return self.second.run(sites, call)

    def note(self) -> None:
        """Keep token ids, or embeddings, and the positions that the call gives them."""
        name, tokens = self.call.tokens
        positions = self.call.kwargs.get("position_ids")
        text_of(self.kept, self.call.past).add(self.call.past, {name: tokens, "position_ids": positions})

    def _whole(self) -> Call:
        """A call with the whole text so far."""
        length = self.call.past + self.call.tokens[1].shape[1]
        mask = plain_mask(self.call.kwargs.get("attention_mask"))
        whole = text_of(self.kept, self.call.past).whole(length)
        return Call((), whole | {"attention_mask": mask if mask is None else mask[:, :length].long()}, past=0)

    def tangents(self, sites: Sequence[Site], direction: Direction, *, goes_on: bool) -> dict[Site, Tensor]:
        """Forward-mode derivatives, or central differences where the direction carries a step.

        For a central difference the states on both sides of the step come from two passes with KV caches of their own.
        """
        key, past = id(direction.values[0]), self.call.past
        if past == 0:
            self.kept[key] = Tracks()
        elif self.kept.get(key) is None or self.kept[key].length != past:
            raise RuntimeError(
                f"the tangents of {past} earlier tokens are not known: they went through the model before it was "
                "steered, or at positions that `where` leaves out; begin with an empty KV cache"
            )
        tracks = self.kept[key].sides
        with self.second.aside(), torch.inference_mode(False), torch.no_grad(), PlainAttention():
            along = self.second.along(direction)
            if not direction.step:
                with forward_mode_turn(), forward_ad.dual_level():
                    changed = _at_places((names, forward_ad.make_dual(at, value)) for names, at, value in along)
                    found = self.second.run(sites, self.call, changed, tracks[0] if goes_on else None)
                    return {site: _tangent(value) for site, value in found.items()}
            sides = []
            for sign, track in zip((1, -1), tracks, strict=True):
                changed = _at_places((names, at + sign * direction.step * value) for names, at, value in along)
                sides.append(self.second.run(sites, self.call, changed, track if goes_on else None))
            return {site: (sides[0][site] - sides[1][site]) / (2 * direction.step) for site in sites}


class Tracks:
    """What a sequence keeps for its tangents: a KV cache with other parameters, or two, on both sides of a step."""

    def __init__(self) -> None:
        self.sides = [_Kept(), _Kept()]

    @property
    def length(self) -> int:
        """Number of tokens in it."""
        return self.sides[0].length

    def rows(self, index: Tensor) -> None:
        """Take other rows, `[new batch]`."""
        for side in self.sides:
            side.rows(index)

    def cut(self, column: int) -> None:
        """Forget the columns from this one on."""
        for side in self.sides:
            side.cut(column)

    def fork(self) -> Tracks:
        """A copy that goes on by itself."""
        return copy.deepcopy(self)


class _Kept:
    """A KV cache of one sequence with other parameters, and its tangents, which do not outlive a dual level."""

    def __init__(self) -> None:
        self.length = 0
        self._cache: Any = None
        self._tangents: list[list[Tensor | None]] = []

    def cache(self, base: nn.Module) -> Any:
        """The cache, with its tangents if a dual level is entered."""
        if self._cache is None:
            from transformers import DynamicCache

            self._cache = DynamicCache(config=base.config)
        # none before the first pass, however many layers the cache has by then
        for layer, tangents in zip(self._cache.layers, self._tangents, strict=False):
            for name, tangent in zip(_SIDES, tangents, strict=True):
                if tangent is not None:
                    setattr(layer, name, forward_ad.make_dual(getattr(layer, name), tangent))
        return self._cache

    def rows(self, index: Tensor) -> None:
        """See `Tracks`."""
        if self._cache is not None:
            self._cache.batch_select_indices(index)
            self._tangents = [
                [None if side is None else side[index.to(side.device)] for side in layer] for layer in self._tangents
            ]

    def cut(self, column: int) -> None:
        """See `Tracks`."""
        excess = self.length - column
        if excess <= 0:
            return
        if column == 0:
            self.length, self._cache, self._tangents = 0, None, []
            return
        self._cache.crop(-excess)
        self.length = column
        self._tangents = [
            [None if side is None else side[..., :-excess, :] for side in layer] for layer in self._tangents
        ]

    def keep(self) -> None:
        """Take the tangents out of the cache after a pass."""
        self.length = int(self._cache.get_seq_length())
        self._tangents = []
        for layer in self._cache.layers:
            self._tangents.append([])
            for name in _SIDES:
                side = getattr(layer, name, None)
                # layers beyond the last steered one hold nothing
                primal, tangent = (None, None) if side is None else forward_ad.unpack_dual(side)
                self._tangents[-1].append(tangent)
                if tangent is not None:
                    setattr(layer, name, primal)


_SIDES = ("keys", "values")


class _EnoughError(Exception):
    """Every state is there."""


def gather(spots: dict[Site, Spot], forward: Callable[[], Any], rows: int = 1) -> dict[Site, Tensor]:
    """States at some spots of a forward pass of `rows` texts, which ends at the last of them."""
    found: dict[Site, Tensor] = {}

    def note(site: Site, heads: int, scale: float, value: Tensor) -> None:
        # TransformerBridge shows heads split in some families and in one piece in others
        value = value if value.ndim > 2 else value.unflatten(0, (rows, -1))
        value = value.flatten(2).unflatten(-1, (heads, -1)) if heads else value
        # a copy, as some blocks add to a branch in place
        found[site] = value.clone() if scale == 1 else value * scale
        if len(found) == len(spots):
            raise _EnoughError

    handles = []
    try:
        for site, (module, side, heads, scale) in spots.items():
            handles.append(watch((module, side), partial(note, site, heads, scale)))
        forward()
    except _EnoughError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the name that Hugging Face gives them, where TransformerBridge has put modules between."""
    return {name.replace("_original_component.", ""): value for name, value in module.named_parameters()}


def everywhere(module: nn.Module, prefix: str = "") -> dict[int, list[str]]:
    """By the id of each parameter, its names for `functional_call(..., tie_weights=False)`: one per module that has it.

    TransformerBridge's modules are reached by several paths. A parameter that `functional_call` swaps twice in one
    module is not swapped back, and the model would be left changed.

    Upstream: torch (2.13) swaps by name and not by parameter; goes when `functional_call` follows shared modules.
    """
    found: dict[int, list[str]] = {}
    for path, part in module.named_modules(prefix=prefix):
        for name, value in part._parameters.items():
            if value is not None:
                found.setdefault(id(value), []).append(f"{path}.{name}" if path else name)
    return found


def _at_places(values: Iterable[tuple[list[str], Tensor]]) -> dict[str, Tensor]:
    return {name: value for names, value in values for name in names}


def _fresh(value: Any) -> Any:
    """A copy of a tensor made in inference mode that may be used outside it."""
    if isinstance(value, Tensor):
        return value.clone()
    return tuple(_fresh(entry) for entry in value) if isinstance(value, tuple) else value


def _tangent(value: Tensor) -> Tensor:
    primal, tangent = forward_ad.unpack_dual(value)
    return torch.zeros_like(primal) if tangent is None else tangent
