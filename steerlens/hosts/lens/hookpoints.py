"""TransformerLens's hook points: what its two model classes share, and a pass that is attached to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from steerlens.core import Display, Pass, Site
from steerlens.hosts.attachment import Attachment
from steerlens.hosts.base import Host
from steerlens.hosts.blocks.graph import Place, pool
from steerlens.hosts.lens.seats import Change, Seat, place_of, spliced
from steerlens.hosts.steered import Steered
from steerlens.hosts.weights import device_of, dtype_of


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
        self._names: set[str] | None = None

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None."""
        return self.model.tokenizer

    @property
    def prepends_bos(self) -> bool:
        """TransformerLens's own setting, True unless changed, whatever the tokenizer was made to do."""
        return bool(self.model.cfg.default_prepend_bos)

    @property
    def block(self) -> nn.Module:
        """The first block."""
        return self.model.blocks[0]

    @property
    def device(self) -> torch.device:
        """Where the first block computes."""
        return device_of(self.model.blocks[0])

    @property
    def dtype(self) -> torch.dtype:
        """In what the first block computes (`cfg.dtype` of a Bridge says float32 whatever the model is)."""
        return dtype_of(self.model.blocks[0])

    def missing(self, site: Site) -> str | None:
        """Why there is no such hook point."""
        if self._names is None:  # a Bridge makes them anew at each access, in some milliseconds
            self._names = set(self.modules())
        return None if str(site) in self._names else "has no such hook point in TransformerLens"

    def find(self, sites: Iterable[Site]) -> dict[Site, nn.Module]:
        """What stands at sites, hook points or SAEs.

        Upstream: TransformerBridge (4.3) ignores unknown names; the check goes when it raises.
        """
        modules = self.modules()  # a Bridge makes it anew at each access, in some milliseconds
        found = {site: modules.get(str(site)) for site in sites}
        for site, module in found.items():
            if not isinstance(module, HookPoint) and not spliced(module):
                raise ValueError(f"'{site}' is not a hook point of this model, nor an SAE of sae-lens in its place")
        return found  # type: ignore[return-value]

    def seat(self, site: Site, module: nn.Module, change: Change, rows: Callable[[], int], **where: bool) -> Seat:
        """A function at a site, where `find` has found a module; `outgoing` and `last` as for a `Seat`."""
        return Seat(self.address(site, module), change, self.shape(site), rows, **where)

    def modules(self) -> Mapping[str, nn.Module]:
        """Hook points, and SAEs in their place, by TransformerLens name."""
        raise NotImplementedError

    def address(self, site: Site, module: nn.Module) -> Callable[[], nn.Module | None]:
        """What finds the module that stands at a site at any later time, in a microsecond."""
        raise NotImplementedError

    def signal_taken(self, name: str) -> bool:
        """Whether a hook point of this name exists already."""
        raise NotImplementedError

    def publish(self, points: Mapping[str, HookPoint]) -> None:
        """Make hook points of ours known to the model, once more where it has forgotten them."""
        raise NotImplementedError

    def withdraw(self, points: Mapping[str, HookPoint]) -> None:
        """Take hook points of ours off again."""
        raise NotImplementedError

    def wraps(self, steered: Steered) -> list[Any]:
        """What stands around the model's methods while it is steered, so that passes and generations are known."""
        raise NotImplementedError

    def writes_mid(self) -> bool:
        """Whether writing `hook_resid_mid` changes the residual stream."""
        raise NotImplementedError

    def _shows_pads(self, tokens: Any, steered: Steered) -> bool:
        """Whether a batch of tokens without a mask is padded, on the right, with a token that is nothing but a pad."""
        tokenizer = self.tokenizer
        if tokenizer is None or steered.generation is not None or not isinstance(tokens, Tensor):
            return False
        if tokens.ndim != 2 or tokens.is_floating_point() or len(tokens) < 2 or tokens.shape[1] < 2:
            return False
        pad = tokenizer.pad_token_id
        special = (None, tokenizer.bos_token_id, tokenizer.eos_token_id)
        return pad not in special and getattr(tokenizer, "padding_side", "right") == "right"

    def head_writes(self, layer: int) -> Tensor:
        """Of attention, `[head d_head d]`, as TransformerLens names it."""
        return self.model.blocks[layer].attn.W_O.detach()

    def attach(self, run: Pass, *, payload_limit: int, timeout_s: float) -> Attachment:
        """Permanent hooks at the sites of the pass, and hook points for its signals."""
        return LensAttachment(self, run)

    def sample(self, ids: Tensor, count: int, *, temperature: float) -> Tensor:
        """Prompts and their continuations, by the model's own `generate`."""
        ends = getattr(self.tokenizer, "eos_token_id", None) is not None
        return self.model.generate(
            ids.to(self.device),
            max_new_tokens=count,
            do_sample=temperature > 0,
            temperature=temperature or 1.0,
            stop_at_eos=ends,
            return_type="tokens",
            verbose=False,
        )

    def _read(self, ids: Tensor, mask: Tensor, weights: Tensor | None, sites: Sequence[Site]) -> list[Tensor]:
        found: dict[Site, Tensor] = {}

        thread = get_ident()

        def keep(site: Site) -> Change:
            def note(x: Tensor) -> None:
                if get_ident() == thread:  # another thread may run the model meanwhile
                    found[site] = pool(x.detach(), weights).cpu()

            return note

        rows = len(ids)
        seats = [self.seat(site, module, keep(site), lambda: rows) for site, module in self.find(sites).items()]
        try:
            for seat in seats:
                seat.take()
            with torch.inference_mode(False), torch.no_grad():
                last = max(site.layer for site in sites)
                self._forward(ids, mask, stop=None if last + 1 >= self.n_layers else last + 1)
        finally:
            for seat in seats:
                seat.leave()
        return [found[site] for site in sites]

    def entrance(self) -> nn.Module:
        """Where the residual stream begins."""
        return self._places([])[0]

    def _places(self, sites: Sequence[Site]) -> tuple[nn.Module, list[Place]]:
        start, mid = Site(0, "resid_pre"), self.writes_mid()
        # where the Bridge's resid_mid is a branch, the attention output, which is added to it, has the same gradient
        read = [Site(site.layer, "attn_out") if site.point == "resid_mid" and not mid else site for site in sites]
        modules = self.find({start, *read})
        return modules[start], [place_of(modules[site]) for site in read]

    def _forward(self, ids: Tensor, mask: Tensor, stop: int | None) -> None:
        raise NotImplementedError


class LensAttachment(Attachment):
    """Hooks and signal points of one pass on one model."""

    def __init__(self, host: LensHost, run: Pass):
        self.run = run
        self._host = host
        self._points: dict[str, HookPoint] = {}
        self._seats: list[Seat] = []
        try:
            self._install()
        except BaseException:
            self.detach()
            raise

    def _install(self) -> None:
        host, run = self._host, self.run
        if run.record is not None:
            for names in run.names.values():
                for name in names.names():
                    self._points[name] = point = HookPoint()
                    point.name = name
            run.display = SignalPoints(self._points)
            host.publish(self._points)
        modules = host.find({place for site in run.sites for place in (site, *self._around(site))})
        self._check_transcoders(modules)
        for site in run.sites:
            if self._around(site):
                self._steer_mid(modules, site)
            else:
                self._sit(host.seat(site, modules[site], _acting(run, site), self._rows))
        Steered.attach(host.model, self, host.wraps)

    def _check_transcoders(self, modules: Mapping[Site, nn.Module]) -> None:
        everything = self._host.modules()
        read = [everything.get(name) for name in getattr(self._host.model, "_transcoder_output_hooks", ())]
        for site, module in modules.items():
            if site in self.run.names and any(module is other for other in read):
                raise ValueError(
                    f"a transcoder reads '{site}' before a control could be added there; splice it in after steer()"
                )

    def _sit(self, seat: Seat) -> None:
        self._seats.append(seat)
        seat.take()

    def _rows(self) -> int:
        return self.run.positions.batch

    def _around(self, site: Site) -> tuple[Site, ...]:
        """Where to hook for a control that cannot be written at its own site."""
        if site.point != "resid_mid" or self._host.writes_mid() or site not in self.run.names:
            return ()
        return Site(site.layer, "resid_pre"), Site(site.layer, "attn_out")

    def _steer_mid(self, modules: dict[Site, nn.Module], site: Site) -> None:
        """Adds to the attention output what a write to the Bridge's `hook_resid_mid` would lose."""
        before: list[Tensor] = []

        def enter(x: Tensor) -> None:
            before[:] = [x]

        def act(x: Tensor) -> Tensor:
            return self.run.at(site, before.pop() + x, carrier=x)

        entrance, branch = self._around(site)
        self._sit(self._host.seat(entrance, modules[entrance], enter, self._rows, outgoing=True, last=True))
        self._sit(self._host.seat(branch, modules[branch], act, self._rows, outgoing=True))

    def ready(self) -> None:
        """Move to where the model's places are by now."""
        self._host.publish(self._points)  # HookedTransformer.setup() rebuilds its table
        # the latest first, each before what is there: so runs keep their order, and hooks of the user's that were set
        # since an SAE came or went see steered states, as they would have without it
        for seat in reversed(self._seats):
            seat.follow()

    def strip(self, find: Callable[[Any], Any]) -> None:
        """Hooks and hook points off a copy."""
        for seat in self._seats:
            seat.strip(find)
        twin = find(self._host.model)
        if twin is not None:
            points = {name: find(point) for name, point in self._points.items()}
            type(self._host)(twin).withdraw(points)

    def _take_off(self) -> None:
        for seat in self._seats:
            seat.leave()
        self._host.withdraw(self._points)
        steered = Steered.of(self._host.model)
        if steered is not None:
            steered.leave(self)
        self.run.display = None


class SignalPoints(Display):
    """Hook points of ours, by name."""

    def __init__(self, points: Mapping[str, HookPoint]):
        self._points = points

    def looks(self, name: str) -> bool:
        """Whether a hook of any kind is there."""
        point = self._points[name]
        return bool(
            point._forward_hooks or point._forward_pre_hooks or point._backward_hooks or point._backward_pre_hooks
        )

    def show(self, name: str, value: Tensor) -> Tensor:
        """What the hooks leave."""
        return self._points[name](value)


def _acting(run: Pass, site: Site) -> Change:
    def act(x: Tensor) -> Tensor | None:
        steered = run.at(site, x)
        return None if steered is x else steered

    return act
