"""Passes and generations of a Hugging Face model, whoever has wrapped it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from steerlens.core.record import cut, take
from steerlens.hosts.blocks import hf
from steerlens.hosts.caches import Generation
from steerlens.hosts.steered import Steered, Wrapped


def hf_pass(steered: Steered, beside: Callable[..., Any], inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A forward pass of the module that runs the blocks.

    Args:
        beside: From the call's arguments and its past, what makes a companion.
        inner: The module's `forward`.
    """
    with steered.passing() as begin:
        if begin is None:
            return inner(*args, **kwargs)
        call = hf.call_shape(args, kwargs)
        if call["mask"] is None:
            call["mask"] = steered.pads(call["tokens"])
        identity = begin(call.pop("shape"), companion=beside(args, kwargs, call["past"]), **call)
        output = inner(*args, **kwargs)
        if call["cache"] is None:
            made = hf.made_cache(output)
            if made is not None:
                steered.bind(identity, made)
        return output


#: Ways of transformers to generate for texts that come and go, packed into one row.
_CONTINUOUS = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


def hf_generations(steered: Steered, model: nn.Module, *, whole: bool = False) -> list[Wrapped]:
    """Around transformers' `generate`, and what it calls before each pass of its own.

    Args:
        whole: Passes must go through all blocks.

    Upstream: transformers (5.22) gives a pass no sign of the call of `generate` that it serves, nor of its beams; goes
    when a cache carries both.
    """
    return [
        Wrapped(model, "generate", partial(_generate, steered, whole)),
        Wrapped(model, "prepare_inputs_for_generation", partial(_prepare, steered)),
        *(Wrapped(model, name, partial(_refuse, name)) for name in _CONTINUOUS if hasattr(model, name)),
    ]


def _refuse(name: str, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError(f"{name}() packs texts into one row, which cannot be steered; use generate()")


def _generate(steered: Steered, whole: bool, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if whole and _option(inner, args, kwargs, "assistant_early_exit"):
        raise NotImplementedError(
            "assistant_early_exit runs the first blocks by themselves, which cannot be steered on nnsight; give "
            "another model as assistant_model"
        )
    end, left_out = hf.prompt_end(args, kwargs)
    generation = Generation(end, announced=True)
    # transformers tells which beams a text came from only in the form with all results
    unwrap = _searches(inner, args, kwargs) and not kwargs.get("return_dict_in_generate")
    if unwrap:
        kwargs["return_dict_in_generate"] = True
    with steered.generating(generation):
        result = inner(*args, **kwargs)
    tokens = result if isinstance(result, Tensor) else getattr(result, "sequences", None)
    beams = getattr(result, "beam_indices", None)
    # of embeddings only what follows them is returned
    if isinstance(tokens, Tensor) and generation.identity is not None and kwargs.get("inputs_embeds") is None:
        for sequence in generation.identity.held.values():
            # the last token has not been through the model; speculated ones may have
            cut(sequence.store, left_out + tokens.shape[1] - 1)
            if isinstance(beams, Tensor) and generation.end is not None:
                take(sequence.store, beams, generation.end)
    return tokens if unwrap and tokens is not None else result


def _searches(inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of `generate` is a beam search that returns plain tokens."""
    own = getattr(getattr(inner, "__self__", None), "generation_config", None)
    given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
    if getattr(given or own, "return_dict_in_generate", False):
        return False
    return (_option(inner, args, kwargs, "num_beams") or 1) > 1


def _option(inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """An option of a call of `generate`, or of the configuration that it uses."""
    own = getattr(getattr(inner, "__self__", None), "generation_config", None)
    given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
    return kwargs.get(name) or getattr(given, name, None) or getattr(own, name, None)


def _prepare(steered: Steered, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    generation = steered.generation
    if generation is not None:
        generation.announce(hf.plain_mask(kwargs.get("attention_mask")))
    return inner(*args, **kwargs)
