"""TransformerLens: TransformerBridge (3.x and 4.x) and HookedTransformer (3.x)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from steerlens.core import Site
from steerlens.hosts.base import Host
from steerlens.hosts.blocks import hf
from steerlens.hosts.blocks.bare import Bare
from steerlens.hosts.blocks.learning import Learner
from steerlens.hosts.blocks.nominal import Capture, Nominal
from steerlens.hosts.blocks.second_pass import BaseCompanion, Call, SecondPass, Spot, gather
from steerlens.hosts.blocks.selfcheck import doubts_about
from steerlens.hosts.blocks.turns import turn_of
from steerlens.hosts.generation import hf_generations, hf_pass
from steerlens.hosts.lens.beside import OTHER_PARAMETERS, BlocksCompanion, FrozenEntry
from steerlens.hosts.lens.calls import caching, embed, folded, generate, ids_of, padding_mask, refuse_empty_slots
from steerlens.hosts.lens.hookpoints import LensHost
from steerlens.hosts.lens.seats import place_of
from steerlens.hosts.roles import Layout, output_matrix, refuse_other_kinds, submodule
from steerlens.hosts.steered import PlainCopy, Steered, Wrapped, unsteered
from steerlens.hosts.weights import adapter_of, adapts, held_apart, is_quantised, matrix_of, sides_swapped

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


class BridgeHost(LensHost):
    """TransformerBridge: a Hugging Face model whose modules are wrapped in place."""

    def __init__(self, model: Any):
        super().__init__(model)
        # enable_compatibility_mode() leaves cfg.normalization_type as it was
        self.processed = bool(getattr(model, "_weights_processed", False)) or folded(model.cfg)
        inner = model.original_model
        refuse_other_kinds(type(inner).__name__, inner.config)
        self.layouts = [Layout(block, inner.config.get_text_config()) for block in model.blocks]
        for layout in self.layouts:
            layout.check(type(inner).__name__)
        for block in model.blocks:
            if adapts(getattr(getattr(block, "attn", None), "qkv", None)):
                raise TypeError(
                    f"this {type(model).__name__} leaves out the adapter of PEFT at attention's joint matrix, which "
                    "TransformerLens takes apart; merge it first: model = model.merge_and_unload()"
                )
        self.name = str(getattr(inner.config, "_name_or_path", None) or "")
        self.quantised = is_quantised(inner)
        self._own_names: dict[Site, str] = {}  # the Bridge's, as far as `_spots` has asked for them

    def missing(self, site: Site) -> str | None:
        """Why there is no such hook point, or none that is what its name says."""
        layout = self.layouts[site.layer]
        reason = layout.missing(site.point) if layout.known else None
        if reason is None and site.point == "resid_mid":
            reason = super().missing(Site(site.layer, "attn_out"))  # it is written there
        if reason is None and site.point == "mlp_post" and not layout.known and layout.mixture:
            reason = "is a mixture of experts and has no mlp_post"
        return reason or super().missing(site)

    def doubts(self, sites: Sequence[Site]) -> str | None:
        """What speaks against the points."""

        def read(ids: Tensor, wanted: list[Site]) -> dict[Site, Tensor]:
            with self._aside(), torch.inference_mode(False), torch.no_grad():
                return gather(self._spots(wanted), lambda: self._base(input_ids=ids.to(self.device), use_cache=False))

        return doubts_about(self.model, self.layouts, sites, read, self.missing)

    def _width(self, site: Site) -> int | None:
        return self.layouts[site.layer].widths.get(site.point)

    @property
    def _base(self) -> nn.Module:
        """The Hugging Face base model inside: everything but the unembedding."""
        return self.model.original_model.base_model

    def modules(self) -> Mapping[str, nn.Module]:
        """The Bridge's registry with TransformerLens's names.

        Upstream: sae-lens's own Bridge (6.54) overrides `hook_dict` without the aliases; goes when it keeps them.
        """
        return TransformerBridge.hook_dict.fget(self.model)

    def address(self, site: Site, module: nn.Module) -> Callable[[], nn.Module | None]:
        """By the Bridge's own name, under which sae-lens registers what it splices in."""
        model = self.model
        name = self._registered(module)
        return lambda: model._hook_registry.get(name)

    def _registered(self, module: nn.Module) -> str:
        """The Bridge's own name of a hook point, or of an SAE in its place."""
        return next(name for name, entry in self.model._hook_registry.items() if entry is module)

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
        """No: the Bridge's `hook_resid_mid` is the input of the MLP's norm only.

        Upstream: goes when the Bridge (4.3) has a hook point between the additions.
        """
        return False

    @property
    def _entry(self) -> nn.Module:
        """The module whose blocks these are; OPT's head, for one, calls it and not the base model."""
        first = self.model.blocks[0]
        for module in self._base.modules():
            for child in module.children():
                if isinstance(child, nn.ModuleList) and len(child) and child[0] is first:
                    return module
        return self._base

    def wraps(self, steered: Steered) -> list[Any]:
        """Around the module that runs the blocks, which sees mask and cache however it was called, and `generate`."""
        entry = self._entry
        return [
            PlainCopy(steered, self.model.original_model),
            Wrapped(entry, "forward", partial(hf_pass, steered, self._beside(entry))),
            Wrapped(self.model, "forward", partial(self._list_of_prompts, steered)),
            Wrapped(self.model, "generate", partial(generate, steered)),
            Wrapped(self.model, "generate_stream", steered.stream),
            *hf_generations(steered, self.model.original_model),
        ]

    def _beside(self, entry: nn.Module) -> Callable[..., Any]:
        second = SecondPass(entry, self._aside, self._spots)
        third, config = HookedTransformer is not None, self.model.original_model.config

        def beside(args: tuple[Any, ...], kwargs: dict[str, Any], past: Any) -> Callable[..., BaseCompanion]:
            if third and type(kwargs.get("past_key_values")).__name__ == "StaticCache":
                refuse_empty_slots(config, kwargs.get("attention_mask"))
            return lambda kept: BaseCompanion(second, Call(args, kwargs, past), kept)

        return beside

    def _list_of_prompts(self, steered: Steered, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The Bridge pads a list on the right without a mask, since no real token sees the pads behind it.

        Upstream: goes when the Bridge (4.3) hands its model the mask of what it has padded.
        """
        given = args[0] if args else kwargs.get("input")
        listed = isinstance(given, list) and len(given) > 1
        if kwargs.get("attention_mask") is not None or not (listed or self._shows_pads(given, steered)):
            return inner(*args, **kwargs)
        side = str(kwargs.get("padding_side") or getattr(self.tokenizer, "padding_side", "right"))
        with steered.padding(lambda tokens: padding_mask(self.tokenizer, tokens, self.prepends_bos, side)):
            return inner(*args, **kwargs)

    def learner(self) -> Learner:
        """The Hugging Face model inside."""
        self.need_parameters()
        return Learner(self.model.original_model, self._aside, self._spots)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """The model without what is attached to it and without any hook."""
        with unsteered(self.model), Bare(self.model.original_model):
            yield

    def _spots(self, sites: Sequence[Site]) -> dict[Site, Spot]:
        heads, registry, own = self.n_heads, self.model._hook_registry, self._own_names
        # the second pass asks at every token: `find` makes all names of the Bridge anew
        found = {site: registry.get(own.get(site)) for site in sites}
        if None in found.values():
            found = self.find(sites)
            own.update({site: self._registered(module) for site, module in found.items()})
        return {site: (*place_of(found[site]), heads if site.point == "z" else 0, 1.0) for site in sites}

    def nominal(self, tokens: Sequence[int]) -> Nominal:
        """The unsteered path of the last token."""
        return self.resting(lambda: hf.nominal(self._base, list(self.model.blocks), tokens))

    def _probed(self) -> Tensor | None:
        found = self._out_weight(self.n_layers - 1)
        return output_matrix(self.model.blocks[-1], self.layouts[-1]) if found is None else found

    def _out_weight(self, layer: int) -> Tensor | None:
        try:
            return matrix_of(self.model.blocks[layer].mlp.out.original_component)
        except AttributeError:
            return None

    def head_writes(self, layer: int) -> Tensor:
        """Of attention, `[head d_head d]`."""
        self.need_plain_matrices()
        path, _ = self.layouts[layer].paths.get("z", ("", ""))
        module = submodule(self.model.blocks[layer], path)
        if not path or self.processed or not self.adapter():
            return super().head_writes(layer)
        # TransformerLens names the matrix without what an adapter adds
        weight = matrix_of(module) if sides_swapped(module) else matrix_of(module).T
        return weight.detach().unflatten(0, (self.n_heads, -1))

    def adapter(self) -> list[float]:
        """As `Dimensions.adapter`."""
        return adapter_of(reversed(list(self.model.blocks)))

    def apart(self) -> str | None:
        """As `Dimensions.apart`."""
        return held_apart(self.model.blocks)

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
        self.processed = folded(model.cfg)

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

    def wraps(self, steered: Steered) -> list[Wrapped]:
        """Around `forward`, which `generate` calls directly, from any layer on."""
        return [
            Wrapped(self.model, "forward", partial(self._pass, steered)),
            Wrapped(self.model, "input_to_embed", partial(self._embedded, steered)),
            Wrapped(self.model.embed, "forward", partial(embed, steered)),
            Wrapped(self.model, "get_caching_hooks", caching),
            Wrapped(self.model, "generate", partial(generate, steered)),
            Wrapped(self.model, "generate_stream", steered.stream),
        ]

    def _pass(self, steered: Steered, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A forward pass, which may begin and end at any layer."""
        given, rest = (args[0], args[1:]) if args else (kwargs.pop("input"), ())
        with steered.passing() as begin:
            if begin is None:
                return inner(given, *rest, **kwargs)
            start = kwargs.get("start_at_layer")
            call = {"cache": kwargs.get("past_kv_cache"), "begin": begin}
            if start is not None:
                mask, positions = kwargs.get("attention_mask"), kwargs.get("shortformer_pos_embed")
                layer = range(self.n_layers)[start]
                ids = given if layer else ids_of(steered, given)
                self._begin(call, given, tokens=ids, mask=mask, positions=positions, layer=layer)
                return inner(given, *rest, **kwargs)
            if self._shows_pads(given, steered) and kwargs.get("attention_mask") is None:
                call["pads"] = padding_mask(self.tokenizer, given, self.prepends_bos, "right")
            if isinstance(given, (str, list)):
                # None: as the model and its tokenizer are configured
                prepend, side = kwargs.get("prepend_bos"), kwargs.get("padding_side")
                listed = isinstance(given, list) and len(given) > 1
                given = self.model.to_tokens(given, prepend_bos=prepend, padding_side=side)
                if listed:
                    # padded on the right it has no mask, since no real token sees the pads behind it
                    bos, side = self.prepends_bos if prepend is None else prepend, side or self.tokenizer.padding_side
                    call["pads"] = padding_mask(self.tokenizer, given, bos, side)
            steered.expected.append(call)
            try:
                return inner(given, *rest, **kwargs)
            finally:
                if call in steered.expected:
                    steered.expected.remove(call)

    def _embedded(self, steered: Steered, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The part of a forward pass that knows the mask of all tokens so far."""
        result = inner(*args, **kwargs)
        if steered.expected:
            call = steered.expected.pop()
            state, tokens, positions, mask = result
            mask = call.get("pads") if mask is None else mask
            self._begin(call, state, tokens=tokens, mask=mask, positions=positions, layer=0)
        return result

    def _begin(
        self, call: dict[str, Any], state: Tensor, *, tokens: Tensor, mask: Any, positions: Any, layer: int
    ) -> None:
        cache = call["cache"]
        past = 0 if cache is None else cache[0].past_keys.shape[1]
        companion = partial(BlocksCompanion, self, layer, state, {"shortformer_pos_embed": positions}, mask, past)
        known = {"past": past, "mask": mask, "device": state.device, "cache": cache}
        call["begin"](state.shape[:2], tokens=tokens, companion=companion, **known)

    def nominal(self, tokens: Sequence[int]) -> Nominal:
        """The unsteered path of the last token."""
        return self.resting(lambda: self._nominal(tokens))

    def _nominal(self, tokens: Sequence[int]) -> Nominal:
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        hf.require_context(tokens)
        ids = torch.as_tensor(tokens, device=self.device)[None]
        with turn_of(self.block), torch.inference_mode(False), torch.no_grad():
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
        raise NotImplementedError(OTHER_PARAMETERS)

    def learner(self) -> Learner:
        """Raises NotImplementedError."""
        raise NotImplementedError(OTHER_PARAMETERS)

    def _out_weight(self, layer: int) -> Tensor | None:
        return getattr(getattr(self.model.blocks[layer], "mlp", None), "W_out", None)

    def _forward(self, ids: Tensor, mask: Tensor, stop: int | None) -> None:
        self.model(ids, attention_mask=mask, return_type=None, stop_at_layer=stop)

    def _logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(ids, attention_mask=mask)
