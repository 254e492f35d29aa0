"""What TransformerBridge and nnsight share: a Hugging Face model underneath, its call arguments and its KV cache."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steerlens.hosts.blocks.context import FixedContext
from steerlens.hosts.blocks.graph import watch
from steerlens.hosts.blocks.nominal import Capture, Nominal, Thaw
from steerlens.hosts.blocks.turns import turn_of
from steerlens.hosts.weights import device_of


def call_shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a call of a Hugging Face base model says of its pass: the shape of its tokens, mask and cache.

    `past` is a tensor if the cache is a static one, and -1 in one if a cache does not count its tokens.
    """
    tokens = kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    if tokens is None:
        tokens = args[0]
    mask = kwargs.get("attention_mask")
    if mask is None and len(args) > 1 and isinstance(args[1], Tensor):
        mask = args[1]
    # no loop: every token comes by
    cache = kwargs.get(CACHES[0])
    if cache is None:
        cache = kwargs.get(CACHES[1])
    if mask is None and tokens.shape[1] > 1:
        _refuse_packed(kwargs, cache)
    past = length_of(cache)
    return {
        "shape": (tokens.shape[0], tokens.shape[1]),
        "past": past if isinstance(past, Tensor) else int(past),
        # asked here, because every token comes by
        "mask": mask if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2) else plain_mask(mask),
        "device": tokens.device,
        "cache": cache,
        "tokens": tokens,
    }


def _refuse_packed(kwargs: dict[str, Any], cache: Any) -> None:
    """Raises NotImplementedError for several texts in one row, which transformers tells apart by their positions."""
    positions = kwargs.get("position_ids")
    packed = kwargs.get("cu_seq_lens_q") is not None
    if not packed and cache is None and isinstance(positions, Tensor) and positions.ndim == 2:
        packed = bool((positions.diff(dim=-1) != 1).any())
    if packed:
        raise NotImplementedError(
            "several texts packed into one row cannot be steered; give each a row of its own, and a mask of its pads"
        )


#: Names of the cache among the arguments and in the output of a base model; Mamba's is the second.
CACHES = ("past_key_values", "cache_params")


def length_of(cache: Any) -> Any:
    """How many tokens a cache holds, a number or a tensor; a tensor of -1 if only recurrent states hold them."""
    if cache is None:
        return 0
    layers = getattr(cache, "layers", None)
    if not layers or not hasattr(layers[0], "has_previous_state"):
        return cache.get_seq_length()
    states = [layer for layer in layers if hasattr(layer, "has_previous_state")]
    if len(states) == len(cache.layers) and not any(hasattr(layer, "keys") for layer in states):
        held = any(any(layer.has_previous_state.values()) for layer in states)
        return torch.tensor(-1) if held else 0
    return cache.get_seq_length()


def made_cache(output: Any) -> Any:
    """The cache in the output of a base model, None if there is none."""
    return next((getattr(output, name) for name in CACHES if getattr(output, name, None) is not None), None)


def plain_mask(mask: Any) -> Tensor | None:
    """Which columns hold real tokens, `[batch pos]`, in the mask that a model is given.

    A static cache needs masks of four dimensions, one for each kind of attention: there the last query sees every real
    token, except through a sliding window.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None or mask.ndim == 2:
        return mask
    if mask.ndim != 4:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; steering needs [batch pos]")
    row = mask[:, 0, -1]
    return row if row.dtype == torch.bool else row == 0


def prompt_end(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | None, int]:
    """First column after the prompt of a call of transformers' `generate`, and how many columns it is not given.

    None: it does not say. With a cache that holds the beginning of the text, `generate` takes either the whole text or
    what is new of it, and tells them apart by the length of the mask; so does this.
    """
    given = [args[0] if args else None, *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))]
    found = [value for value in given if isinstance(value, Tensor) and value.ndim > 1 and value.shape[1]]
    if not found:
        return None, 0
    length = max(value.shape[1] for value in found)
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    past = 0 if cache is None else int(cache.get_seq_length())
    if not past or mask is None or mask.shape[1] == length:
        return length, 0
    return past + length, past


class FrozenCache:
    """Stands in for a layer's KV cache during a replay: gives the past to the new token and keeps nothing."""

    def __init__(self, keys: Tensor, values: Tensor):
        self._past = (keys, values)

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Past and new keys and values, `[n head pos d_head]`."""
        return FixedContext.join(self._past[0], keys, 2), FixedContext.join(self._past[1], values, 2)

    def get_seq_length(self, *_: Any) -> int:
        """Number of past tokens."""
        return self._past[0].shape[2]


def nominal(base: nn.Module, blocks: Sequence[nn.Module], tokens: Sequence[int]) -> Nominal:
    """The last token's path through the blocks of a Hugging Face base model.

    Not of the whole model: logits of all tokens would take more memory than the gains.
    """
    require_context(tokens)
    _require_own_keys(base)
    device = device_of(blocks[0])
    ids = torch.as_tensor(tokens, device=device)[None]
    with turn_of(blocks[0]), torch.inference_mode(False), torch.no_grad():
        whole = _whole_path(base, blocks, ids)
        before = base(input_ids=ids[:, :-1], use_cache=True)
        cache = made_cache(before)
        name = next((name for name in CACHES if getattr(before, name, None) is not None), "")
        if cache is None:
            raise NotImplementedError(f"a {type(base).__name__} has no KV cache, which linearising one token needs")
        # attention's keys are those before the last token, as appending makes new ones; other layers write in place
        past = [layer if _is_attention(layer) else copy.deepcopy(layer) for layer in cache.layers]
        held = [(layer.keys, layer.values) if _is_attention(layer) else None for layer in past]
        with Capture(blocks) as capture:
            base(input_ids=ids[:, -1:], use_cache=True, **{name: cache})
    require_one_path(capture.states(), whole)

    def thawed(layer: int) -> Any:
        again = copy.copy(cache)
        again.layers = [_kept(each) if index == layer else each for index, each in enumerate(past)]
        return again

    def freeze(layer: int, value: Any) -> Any:
        if value is not cache:
            return value
        kept = held[layer] if layer < len(held) else None
        return FrozenCache(*kept) if kept is not None else Thaw(lambda: thawed(layer))

    return capture.nominal(freeze)


def _kept(layer: Any) -> Any:
    """A copy of a layer of a cache whose recurrent state is replaced where transformers overwrites it.

    The state before the token stands in the graph of what comes after it.
    """
    again = copy.deepcopy(layer)
    if not hasattr(again, "recurrent_states"):
        return again

    def replace(recurrent_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        again.recurrent_states[state_idx] = recurrent_states
        return recurrent_states

    again.update_recurrent_state = replace
    for index, state in again.recurrent_states.items():
        if state is not None:
            again.recurrent_states[index] = state.as_subclass(_Unwritten)
    return again


class _Unwritten(Tensor):
    """A state that Mamba's step leaves as it was: it would overwrite what the gradient needs, and reads it no more.

    Upstream: transformers (5.22) updates recurrent states in place; goes, with `_kept`, when its cache replaces them.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.copy_ and isinstance(args[0], cls):
            return args[0]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _is_attention(layer: Any) -> bool:
    """Whether a layer of a cache holds keys and values, and no other state."""
    return getattr(layer, "keys", None) is not None and not hasattr(layer, "recurrent_states")


def _whole_path(base: nn.Module, blocks: Sequence[nn.Module], ids: Tensor) -> list[Tensor]:
    """The last token's states in a pass without a cache, no more of it held."""
    states: list[Tensor] = []

    def note(x: Tensor) -> None:
        states.append(x[0, -1].clone())

    handles = [watch((block, "input"), note) for block in blocks]
    handles.append(watch((blocks[-1], "output"), note))
    try:
        base(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return states


def _require_own_keys(base: nn.Module) -> None:
    shared = getattr(base.config.get_text_config(), "num_kv_shared_layers", 0)  # type: ignore[union-attr, operator]
    if shared:
        raise NotImplementedError(
            f"the last {shared} blocks of this model use keys and values of an earlier block, so that its "
            "linearisation is no product of the blocks' Jacobians; use a method that does not linearise"
        )


def require_one_path(cached: Sequence[Tensor], whole: Sequence[Tensor]) -> None:
    """Raises RuntimeError if the last token's states in a pass with a cache are not those of a whole pass.

    Some releases of libraries are wrong in one of them; a linearisation would inherit it.
    """
    for layer, (a, b) in enumerate(zip(cached, whole, strict=True)):
        off = float((a - b).float().norm()) / max(float(b.float().norm()), 1e-30)
        if off > _PATHS.get(a.dtype, 0.1):  # what is not finite is told elsewhere
            raise RuntimeError(
                f"the state of the last token at block {layer} has norm {float(a.float().norm()):.6g} with a KV cache "
                f"and {float(b.float().norm()):.6g} without one, and differs by {off:.1e} of it: this library and "
                "model compute two different things, so there is no path to linearise around. If a controller is "
                "attached, linearise the model before"
            )


#: Largest relative difference, by dtype.
_PATHS = {torch.float64: 1e-3, torch.float32: 1e-3}


def require_context(tokens: Sequence[int]) -> None:
    """Raises ValueError for a text too short to have a last token and a context."""
    if len(tokens) < 2:
        raise ValueError(f"linearisation needs a text of at least 2 tokens, it got {len(tokens)}")
