"""TransformerLens: TransformerBridge (3.x and 4.x) and HookedTransformer (3.x)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from steerlens.core import Companion, Direction, Record, Site
from steerlens.hosts.base import Host
from steerlens.hosts.blocks import hf
from steerlens.hosts.blocks.context import FixedContext
from steerlens.hosts.blocks.learning import Learner
from steerlens.hosts.blocks.nominal import Capture, Nominal
from steerlens.hosts.blocks.second_pass import BaseCompanion, Spot, gather, require_whole
from steerlens.hosts.lens.hookpoints import Bare, LensHost
from steerlens.hosts.lens.seats import place_of

try:
    from transformer_lens import HookedTransformer
except ImportError:  # TransformerLens 4
    HookedTransformer = None


def claim(model: Any) -> Host | None:
    """A host for a TransformerLens model, or None."""
    if isinstance(model, TransformerBridge):
        return BridgeHost(model)
    if HookedTransformer is not None and isinstance(model, HookedTransformer):
        return HookedHost(model)
    return None


def activation_cache(record: Record, model: Any, n_layers: int) -> Any:
    """A TransformerLens `ActivationCache` that holds a record's signals under their hook names.

    Args:
        model: Where it is no TransformerLens model, the cache knows the number of layers in its place, no more: what it
            stacks over layers works, what it projects on weights does not.
    """
    from transformer_lens import ActivationCache

    if not hasattr(model, "cfg"):
        model = SimpleNamespace(cfg=SimpleNamespace(n_layers=n_layers))
    return ActivationCache(dict(record), model)


class BridgeHost(LensHost):
    """TransformerBridge: a Hugging Face model whose modules are wrapped in place."""

    def __init__(self, model: Any):
        super().__init__(model)
        # enable_compatibility_mode() leaves cfg.normalization_type as it was
        self.processed = bool(getattr(model, "_weights_processed", False)) or _folded(model.cfg)

    @property
    def _base(self) -> nn.Module:
        """The Hugging Face base model inside: everything but the unembedding."""
        return self.model.original_model.base_model

    def modules(self) -> Mapping[str, nn.Module]:
        """The Bridge's registry with TransformerLens's names, which sae-lens's own Bridge leaves out."""
        return TransformerBridge.hook_dict.fget(self.model)

    def address(self, site: Site, module: nn.Module) -> Callable[[], nn.Module | None]:
        """By the Bridge's own name, under which sae-lens registers what it splices in."""
        model = self.model
        name = next(name for name, entry in model._hook_registry.items() if entry is module)
        return lambda: model._hook_registry.get(name)

    def signal_taken(self, name: str) -> bool:
        """Whether a hook point of this name exists already."""
        return name in self.model._hook_registry

    def publish(self, points: Mapping[str, HookPoint]) -> None:
        """Into the Bridge's registry, of which `hook_dict` is a copy."""
        if points and next(iter(points)) not in self.model._hook_registry:
            self.model._hook_registry.update(points)

    def withdraw(self, points: Mapping[str, HookPoint]) -> None:
        """Out of the registry."""
        for name, point in points.items():
            if self.model._hook_registry.get(name) is point:
                del self.model._hook_registry[name]

    def writes_mid(self) -> bool:
        """No: the Bridge's `hook_resid_mid` is the input of the MLP's norm only."""
        return False

    def watch(self, begin: Callable[..., None], layers: Sequence[int]) -> list[Any]:
        """Through a pre-hook on the Hugging Face base model, which sees mask and cache however it was called."""

        base = self._base
        kept: dict[int, Any] = {}

        def entering(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = hf.call_shape(args, kwargs)
            begin(**call, companion=BaseCompanion(base, self._aside, self._spots, args, kwargs, call["past"], kept))

        return [base.register_forward_pre_hook(entering, with_kwargs=True)]

    def learner(self) -> Learner:
        """The Hugging Face model inside."""
        return Learner(self.model.original_model, self._aside, self._spots)

    def _aside(self) -> Bare:
        return Bare(self.model.original_model)

    def _spots(self, sites: Sequence[Site]) -> dict[Site, Spot]:
        heads = self.n_heads
        found = self.find(sites)
        return {site: (*place_of(found[site]), heads if site.point == "z" else 0, 1.0) for site in sites}

    def nominal(self, tokens: Sequence[int]) -> Nominal:
        """The unsteered path of the last token."""
        return hf.nominal(self._base, list(self.model.blocks), tokens)

    def _out_weight(self, layer: int) -> Tensor | None:
        try:
            return self.model.blocks[layer].mlp.out.original_component.weight
        except AttributeError:
            return None

    def _forward(self, ids: Tensor, mask: Tensor, stop: int | None) -> None:
        if stop is None:  # with return_type=None the Bridge computes logits and drops them
            self._base(input_ids=ids, use_cache=False)
        else:
            self.model(ids, stop_at_layer=stop)

    def logits(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits of rows; a mask goes to the model, which `_logits` can do without on the right."""
        ids = ids.to(self.device)
        return self.model(ids) if mask is None else self.model(ids, attention_mask=mask.to(self.device))

    def _logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(ids)


class HookedHost(LensHost):
    """HookedTransformer of TransformerLens 3."""

    def __init__(self, model: Any):
        super().__init__(model)
        self.processed = _folded(model.cfg)

    def modules(self) -> Mapping[str, nn.Module]:
        """By name, hook points among them; `hook_dict` lacks one in whose place there is an SAE."""
        return self.model.mod_dict

    def address(self, site: Site, module: nn.Module) -> Callable[[], nn.Module | None]:
        """In the table, which `setup()` makes anew."""
        model, name = self.model, str(site)
        return lambda: model.mod_dict.get(name)

    def signal_taken(self, name: str) -> bool:
        """Whether a hook point of this name exists already."""
        return name in self.model.hook_dict

    def publish(self, points: Mapping[str, HookPoint]) -> None:
        """As modules of their blocks, where `setup()`, which sae-lens calls for each SAE, finds them again."""
        for name, point in points.items():
            if self.model.hook_dict.get(name) is point:
                return
            block, _, last = name.rpartition(".")
            self.model.get_submodule(block).add_module(last, point)
            self.model.hook_dict[name] = self.model.mod_dict[name] = point

    def withdraw(self, points: Mapping[str, HookPoint]) -> None:
        """Off their blocks and out of the tables."""
        for name, point in points.items():
            block, _, last = name.rpartition(".")
            modules = self.model.get_submodule(block)._modules
            for table, key in ((modules, last), (self.model.hook_dict, name), (self.model.mod_dict, name)):
                if table.get(key) is point:
                    del table[key]

    def writes_mid(self) -> bool:
        """Yes."""
        return True

    def watch(self, begin: Callable[..., None], layers: Sequence[int]) -> list[Any]:
        """Through pre-hooks on the controlled blocks: `generate` calls `forward` directly, from any layer."""
        seen = -1

        def entering(layer: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                nonlocal seen
                entry = kwargs.get("past_kv_cache_entry")
                if isinstance(entry, FrozenEntry):
                    raise RuntimeError("a block is replayed while the model is steered; linearise before steering")
                if layer <= seen or seen < 0:
                    past = entry.past_keys.shape[1] if entry is not None else 0
                    x = args[0]
                    call = {"shape": x.shape[:2], "past": past, "mask": kwargs.get("attention_mask")}
                    begin(**call, device=x.device, companion=BlocksCompanion(self, layer, args, kwargs, past))
                seen = layer

            return hook

        return [self.model.blocks[n].register_forward_pre_hook(entering(n), with_kwargs=True) for n in sorted(layers)]

    def nominal(self, tokens: Sequence[int]) -> Nominal:
        """The unsteered path of the last token."""
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        hf.require_context(tokens)
        ids = torch.as_tensor(tokens, device=self.device)[None]
        with torch.inference_mode(False), torch.no_grad():
            cache = TransformerLensKeyValueCache.init_cache(self.model.cfg, self.device, 1)
            for entry in cache.entries:  # cfg.dtype is not the weights' after model.to(dtype)
                entry.past_keys, entry.past_values = (
                    side.to(self.dtype) for side in (entry.past_keys, entry.past_values)
                )
            ones = torch.ones_like(ids)
            self.model(ids[:, :-1], return_type=None, past_kv_cache=cache, attention_mask=ones[:, :-1])
            past = [(entry.past_keys, entry.past_values) for entry in cache.entries]
            with Capture(list(self.model.blocks), carried=len(tokens)) as capture:
                self.model(ids[:, -1:], return_type=None, past_kv_cache=cache, attention_mask=ones[:, -1:])
        entries = {id(entry): index for index, entry in enumerate(cache.entries)}

        def freeze(layer: int, value: Any) -> Any:
            return FrozenEntry(*past[layer]) if id(value) in entries else value

        return capture.nominal(freeze)

    def need_parameters(self) -> None:
        """Raises NotImplementedError."""
        raise NotImplementedError(_OTHER_PARAMETERS)

    def learner(self) -> Learner:
        """Raises NotImplementedError."""
        raise NotImplementedError(_OTHER_PARAMETERS)

    def _out_weight(self, layer: int) -> Tensor | None:
        return getattr(getattr(self.model.blocks[layer], "mlp", None), "W_out", None)

    def _forward(self, ids: Tensor, mask: Tensor, stop: int | None) -> None:
        self.model(ids, attention_mask=mask, return_type=None, stop_at_layer=stop)

    def _logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(ids, attention_mask=mask)


#: A gradient step depends on how a function is parametrised.
_OTHER_PARAMETERS = (
    "a HookedTransformer's parameters are not the model's: biases added, embeddings untied, norms perhaps folded, so a "
    "gradient step on them is another one; use TransformerBridge or nnsight"
)


class BlocksCompanion(Companion):
    """Runs the blocks of a HookedTransformer again, from the one whose call is given.

    Args:
        host: Of the model.
        layer, args, kwargs: The block that is being called, and with what.
        past: Number of tokens in the KV cache.
    """

    def __init__(self, host: HookedHost, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any], past: int):
        self.host = host
        self.layer = layer
        self.args = args
        self.kwargs = kwargs | {"past_kv_cache_entry": None}
        self.past = past

    def states(self, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """The unsteered states of a prompt."""
        require_whole(self.past)
        model = self.host.model

        def run() -> None:
            state = self.args[0]
            for block in model.blocks[self.layer :]:
                state = block(state, *self.args[1:], **self.kwargs)

        with Bare(model), torch.no_grad():
            return gather({site: (*place_of(module), 0, 1.0) for site, module in self.host.find(sites).items()}, run)

    def tangents(self, sites: Sequence[Site], direction: Direction, *, goes_on: bool) -> dict[Site, Tensor]:
        """Raises NotImplementedError."""
        raise NotImplementedError(_OTHER_PARAMETERS)


class FrozenEntry:
    """Stands in for a TransformerLens cache entry during a replay, as `hf.FrozenCache` does for Hugging Face."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.past_keys, self.past_values = keys, values

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Past and new keys and values, `[n pos head d_head]`."""
        return FixedContext.join(self.past_keys, keys, 1), FixedContext.join(self.past_values, values, 1)


def _folded(cfg: Any) -> bool:
    """Whether norm weights were folded into the matrices after them."""
    return str(getattr(cfg, "normalization_type", "")).endswith("Pre")
