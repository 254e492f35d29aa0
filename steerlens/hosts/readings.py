"""What fits have read of a model, kept for the next fit on the same texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from steerlens.core import Site
from steerlens.hosts.types import Model

if TYPE_CHECKING:
    from steerlens.hosts.base import Host

_LOCK = Lock()
_ACTIVE: WeakKeyDictionary[nn.Module, Readings] = WeakKeyDictionary()

#: A text's tokens, the weights with which they are pooled, and where it is read.
Key = tuple[tuple[int, ...], tuple[float, ...], str]


class Readings:
    """Pooled activations of texts, of all layers of each point that was asked for. From `steerlens.readings`.

    Attributes:
        limit: Most bytes that are kept; beyond it the texts that were read first are dropped.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.uses = 0
        self._kept: dict[Key, dict[Site, Tensor]] = {}
        self._stamp: Any = None
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def __repr__(self) -> str:
        return f"Readings({len(self)} texts, {self.nbytes / 1e6:.1f} of {self.limit / 1e6:.0f} MB)"

    @property
    def nbytes(self) -> int:
        """Size of what is kept, in bytes."""
        with self._lock:
            return sum(_nbytes(row) for row in self._kept.values())

    def read(
        self,
        host: Host,
        tokens: Sequence[Sequence[int]],
        weights: Sequence[Sequence[float]],
        sites: Sequence[Site],
        *,
        batch: int,
    ) -> dict[Site, Tensor]:
        """As `Host.read`; passes are made for texts only whose activations are not known."""
        host.trust(sites)
        stamp, where = _stamp(host), str(host.remote)
        keys = [(tuple(text), tuple(map(float, own)), where) for text, own in zip(tokens, weights, strict=True)]
        wanted = {site: _same(site) for site in sorted(sites)}
        with self._lock:
            if self._stamp != stamp:
                self._kept, self._stamp = {}, stamp
            rows = {key: dict(self._kept.get(key, {})) for key in keys}
        lacking = {site for row in rows.values() for site in wanted.values() if site not in row}
        new = {key: index for index, key in enumerate(keys) if any(site not in rows[key] for site in lacking)}
        if new:
            asked = _all_layers(host, {site.point for site in lacking})
            size = len(new) * sum(_numbers(host, site) for site in asked)
            # what does not fit is read as it would be without readings
            fits = size * 8 <= self.limit and host.doubts(asked) is None
            asked = asked if fits else sorted(set(wanted.values()))
            chosen = list(new.values())
            found = host.read_anew([tokens[i] for i in chosen], [weights[i] for i in chosen], asked, batch=batch)
            for row, key in enumerate(new):
                rows[key].update({site: found[site][row].clone() for site in asked})
            if fits:
                self._keep(stamp, {key: rows[key] for key in new})
        return {site: torch.stack([rows[key][same] for key in keys]) for site, same in wanted.items()}

    def _keep(self, stamp: Any, rows: dict[Key, dict[Site, Tensor]]) -> None:
        with self._lock:
            if self._stamp != stamp:
                return
            for key, row in rows.items():
                self._kept[key] = {**self._kept.pop(key, {}), **row}
            total = sum(map(_nbytes, self._kept.values()))
            while total > self.limit:
                total -= _nbytes(self._kept.pop(next(iter(self._kept))))


@contextmanager
def readings(model: Model, *, limit: int = 1 << 30) -> Iterator[Readings]:
    """Let all fits in this context read each text once: what one fit reads of a model the next one finds.

        with sl.readings(model):
            arms = {"caa": sl.caa(model, pairs), "mimic": sl.mimic(model, pairs), "pid": sl.pid(model, pairs)}

    The first fit reads its texts at all layers of the points it asks for, in the passes that it would make anyway; the
    residual stream before and after a block is one point. What is kept are activations pooled as `Pairs.read` says, one
    vector for each text, layer and point: 3 MB for 40 texts and the residual stream of a model of 30 layers and width
    576. They are the unsteered model's, also inside `steer`, equal to those of a fit without it up to rounding.
    Gradients, Jacobians and the tokens' single states are not kept.

    They are dropped at the end of the context, and if the model has changed: weights, device, dtype, adapters, training
    mode, hooks, or a module's `forward`, so that a fit inside `steer` reads anew. A change that PyTorch does not count,
    by `weight.data`, is noticed only if it changes the model's fingerprint: begin a new context after it.
    Contexts of one model within each other, or in several threads, share one memory, with the first one's limit.
    `compare` and `sweep` open one.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model, also one from `remote`.
        limit: Most bytes that are kept, on the CPU; beyond it the texts that were read first are dropped, and a fit
            whose texts alone exceed it keeps nothing.

    Returns:
        A context; what it gives has `len`, the number of texts, and `nbytes`.

    Raises:
        ValueError: a limit that is negative.
    """
    from steerlens.hosts import host_of

    if limit < 0:
        raise ValueError(f"limit={limit}; it is a number of bytes")
    block = host_of(model).block
    with _LOCK:
        kept = _ACTIVE.setdefault(block, Readings(int(limit)))
        kept.uses += 1
    try:
        yield kept
    finally:
        with _LOCK:
            kept.uses -= 1
            if not kept.uses:
                _ACTIVE.pop(block, None)


def readings_of(host: Host) -> Readings | None:
    """What is kept of a model, None outside of `readings`."""
    return _ACTIVE.get(host.block) if _ACTIVE else None


def _same(site: Site) -> Site:
    """The site of the same activation: what enters a block has left the one before."""
    return Site(site.layer - 1, "resid_post") if site.point == "resid_pre" and site.layer else site


def _all_layers(host: Host, points: Iterable[str]) -> list[Site]:
    points = {"resid_pre", "resid_post"} | set(points) if {"resid_pre", "resid_post"} & set(points) else set(points)
    every = {_same(Site(layer, point)) for layer in range(host.n_layers) for point in points}
    return sorted(site for site in every if host.missing(site) is None)


def _numbers(host: Host, site: Site) -> int:
    return int(torch.Size(host.shape(site)).numel())


def _nbytes(row: dict[Site, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in row.values())


class _Itself:
    """Equal to this very object; its id would also be that of a later one, at the same address."""

    def __init__(self, held: Any):
        try:
            self.held: Any = ref(held)
        except TypeError:  # no weak references to such objects
            self.held = lambda: held

    def __eq__(self, other: object) -> bool:
        own = self.held()
        return own is not None and isinstance(other, _Itself) and own is other.held()

    __hash__ = None  # type: ignore[assignment]


def _stamp(host: Host) -> Any:
    """Changes whenever the model may compute something else."""
    root = getattr(host.model, "_module", host.model)
    tensors, hooks = [], []
    for module in root.modules():
        for value in (*module._parameters.values(), *module._buffers.values()):
            if value is not None:
                version = None if value.is_inference() else value._version
                tensors.append((_Itself(value), value.data_ptr() if not value.is_meta else 0, version, value.dtype))
        at = (*module._forward_hooks, *module._forward_pre_hooks)
        lens = [_Itself(hook) for hook in getattr(module, "fwd_hooks", ())]
        # what some libraries put in front of a module, instead of a hook
        own = [_Itself(module.__dict__["forward"])] if "forward" in module.__dict__ else []
        if at or lens or own or module.training:
            hooks.append((_Itself(module), at, lens, own, module.training))
    edits = [_Itself(edit) for edit in getattr(host.model, "_edits", ())]
    return tuple(tensors), tuple(hooks), edits, repr(host.fingerprint())
