"""TransformerLens's hook points: what its two model classes share, and a pass that is attached to them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from steerlens.core import POINTS, Pass, Site
from steerlens.hosts.base import Attachment, Host
from steerlens.hosts.graph import Place, pool


class LensHost(Host):
    """Abstract: what the two TransformerLens classes share."""

    library = "transformer_lens"

    def __init__(self, model: Any):
        cfg = model.cfg
        self.model = model
        self.n_layers = cfg.n_layers
        self.d_model = cfg.d_model
        self.n_heads = cfg.n_heads
        self.d_head = cfg.d_head
        self.d_mlp = cfg.d_mlp
        self.d_vocab = cfg.d_vocab

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None."""
        return self.model.tokenizer

    @property
    def prepends_bos(self) -> bool:
        """TransformerLens's own setting, True unless changed, whatever the tokenizer was made to do."""
        return bool(self.model.cfg.default_prepend_bos)

    @property
    def _weight(self) -> Tensor:
        return next(self.model.blocks[0].parameters())

    @property
    def device(self) -> torch.device:
        """Where the first block's weights are."""
        return self._weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first block's weights (`cfg.dtype` of a Bridge says float32 whatever the model is)."""
        return self._weight.dtype

    def points(self) -> Sequence[str]:
        """Points of the last block that exist as hook points."""
        hooks = self.model.hook_dict
        return [point for point in POINTS if str(Site(self.n_layers - 1, point)) in hooks]

    def find(self, sites: Iterable[Site]) -> dict[Site, HookPoint]:
        """The hook points of sites; names are checked here because TransformerBridge ignores unknown ones."""
        hooks = self.model.hook_dict  # a Bridge makes it anew at each access, in some milliseconds
        found = {site: hooks.get(str(site)) for site in sites}
        for site, hook in found.items():
            if not isinstance(hook, HookPoint):
                raise ValueError(f"'{site}' is not a plain hook point of this model; is an SAE attached there?")
        return found

    def signal_taken(self, name: str) -> bool:
        """Whether a hook point of this name exists already."""
        return name in self.registry()

    def registry(self) -> dict[str, HookPoint]:
        """The table in which the model looks up its hook points by name."""
        raise NotImplementedError

    def tables(self) -> list[dict[str, HookPoint]]:
        """Every table in which a new hook point must stand."""
        return [self.registry()]

    def watch(self, begin: Callable[..., None], layers: Sequence[int]) -> list[Any]:
        """Call `begin(**arguments of Pass.begin)`, a companion among them, as each pass enters; returns the handles."""
        raise NotImplementedError

    def writes_mid(self) -> bool:
        """Whether writing `hook_resid_mid` changes the residual stream."""
        raise NotImplementedError

    def attach(self, run: Pass, *, payload_limit: int, timeout_s: float) -> Attachment:
        """Permanent hooks at the sites of the pass, and hook points for its signals."""
        return LensAttachment(self, run)

    def _read(self, ids: Tensor, mask: Tensor, weights: Tensor | None, sites: Sequence[Site]) -> list[Tensor]:
        found: dict[Site, Tensor] = {}

        def keep(site: Site) -> Callable[..., None]:
            def hook(x: Tensor, hook: HookPoint) -> None:
                found[site] = pool(x.detach(), weights).cpu()

            return hook

        handles = []
        try:
            handles = [_hook(point, keep(site)) for site, point in self.find(sites).items()]
            with torch.inference_mode(False), torch.no_grad():
                last = max(site.layer for site in sites)
                self._forward(ids, mask, stop=None if last + 1 >= self.n_layers else last + 1)
        finally:
            _unhook(handles)
        return [found[site] for site in sites]

    def _places(self, sites: Sequence[Site]) -> tuple[nn.Module, list[Place]]:
        start, mid = Site(0, "resid_pre"), self.writes_mid()
        # where the Bridge's resid_mid is a branch, the attention output, which is added to it, has the same gradient
        read = [Site(site.layer, "attn_out") if site.point == "resid_mid" and not mid else site for site in sites]
        points = self.find({start, *read})
        return points[start], [(points[site], "output") for site in read]

    def _forward(self, ids: Tensor, mask: Tensor, stop: int | None) -> None:
        raise NotImplementedError


class Bare:
    """A context in which a module and all in it have no hooks."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __enter__(self) -> None:
        self._held = []
        for part in self.module.modules():
            hooks = {name: vars(part)[name] for name in _HOOKS if vars(part).get(name)}
            if hooks:
                self._held.append((part, hooks))
                # a handle removes itself from the very dict that it was put into: put others in their place
                vars(part).update({name: type(held)() for name, held in hooks.items()})

    def __exit__(self, *_: Any) -> None:
        for part, hooks in self._held:
            vars(part).update(hooks)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


class LensAttachment(Attachment):
    """Hooks and signal points of one pass on one model."""

    def __init__(self, host: LensHost, run: Pass):
        self._tables = host.tables()
        self._points: dict[str, HookPoint] = {}
        self._lens_handles: list[Any] = []
        self._torch_handles: list[Any] = []
        self._run = run
        self._generation: Any = None
        try:
            self._install(host)
        except BaseException:
            self.detach()
            raise

    def _install(self, host: LensHost) -> None:
        run = self._run
        if run.record is not None:
            for names in run.names.values():
                for name in names.names():
                    self._points[name] = point = HookPoint()
                    point.name = name
            run.tap = self._tap
            self._register(host)
        layers = sorted({site.layer for site in run.sites})
        self._torch_handles = host.watch(lambda **call: self._begin(host, call), layers)
        points = host.find({place for site in run.sites for place in (site, *self._around(host, site))})
        for site in run.sites:
            if self._around(host, site):
                self._steer_mid(points, site)
            else:
                self._lens_handles.append(_hook(points[site], _acting(run, site)))

    def _around(self, host: LensHost, site: Site) -> tuple[Site, ...]:
        """Where to hook for a control that cannot be written at its own site."""
        if site.point != "resid_mid" or host.writes_mid() or site not in self._run.names:
            return ()
        return Site(site.layer, "resid_pre"), Site(site.layer, "attn_out")

    def _steer_mid(self, points: dict[Site, HookPoint], site: Site) -> None:
        """Adds to the attention output what a write to the Bridge's `hook_resid_mid` would lose."""
        before: list[Tensor] = []

        def enter(x: Tensor, hook: HookPoint) -> None:
            before[:] = [x]

        def act(x: Tensor, hook: HookPoint) -> Tensor:
            return self._run.at(site, before.pop() + x, carrier=x)

        self._lens_handles.append(_hook(points[Site(site.layer, "resid_pre")], enter))
        self._lens_handles.append(_hook(points[Site(site.layer, "attn_out")], act))

    def _begin(self, host: LensHost, call: dict[str, Any]) -> None:
        if self._points and next(iter(self._points)) not in self._tables[0]:
            self._register(host)  # HookedTransformer.setup() rebuilds its table
        generation = _generate_frame()
        continues = generation is not None and generation is self._generation
        # kept only where it can matter: the frame holds the locals of generate(), a KV cache among them
        self._generation = generation if call["past"] == 0 else None
        self._run.begin(continues=continues, **call)

    def _register(self, host: LensHost) -> None:
        self._tables = host.tables()
        for table in self._tables:
            table.update(self._points)

    def _tap(self, name: str, value: Tensor) -> Tensor:
        return self._points[name](value)

    def detach(self) -> None:
        """Take every hook and hook point off again."""
        _unhook(self._lens_handles)
        for handle in self._torch_handles:
            handle.remove()
        for table in self._tables:
            for name, point in self._points.items():
                if table.get(name) is point:
                    del table[name]
        self._lens_handles, self._torch_handles, self._points = [], [], {}
        self._run.tap = None
        self._generation = None


def _acting(run: Pass, site: Site) -> Callable[..., Tensor | None]:
    def hook(x: Tensor, hook: HookPoint) -> Tensor | None:
        steered = run.at(site, x)
        return None if steered is x else steered

    return hook


def _hook(point: HookPoint, function: Callable[..., Any]) -> tuple[HookPoint, Any]:
    """A permanent hook, which `reset_hooks()` leaves alone, and what `_unhook` needs to remove just this one."""
    point.add_hook(function, is_permanent=True)
    return point, point.fwd_hooks[-1]


def _unhook(handles: Sequence[tuple[HookPoint, Any]]) -> None:
    for point, handle in handles:
        handle.hook.remove()
        if handle in point.fwd_hooks:
            point.fwd_hooks.remove(handle)


def _generate_frame() -> Any:
    """The frame of the `generate` call that this forward pass serves, or None.

    Without a KV cache each step of a generation is a pass over the whole sequence so far. Nothing but the call it
    belongs to tells such a step from the first pass of a new prompt.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name.startswith("generate"):
            library = frame.f_globals.get("__name__", "").partition(".")[0]
            if library in ("transformer_lens", "transformers", "sae_lens"):
                return frame
        frame = frame.f_back
    return None
