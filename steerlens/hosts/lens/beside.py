"""What a HookedTransformer needs in addition to a pass: an unsteered one, and caches that do not grow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steerlens.core import Companion, Direction, Site
from steerlens.hosts.blocks.context import FixedContext
from steerlens.hosts.blocks.second_pass import gather, require_whole
from steerlens.hosts.lens.hookpoints import Bare
from steerlens.hosts.lens.seats import place_of

#: A gradient step depends on how a function is parametrised.
OTHER_PARAMETERS = (
    "a HookedTransformer's parameters are not the model's: biases added, embeddings untied, norms perhaps folded, so a "
    "gradient step on them is another one; use TransformerBridge or nnsight"
)


class BlocksCompanion(Companion):
    """Runs the blocks of a HookedTransformer again, from the one where a pass begins.

    Args:
        host: Of the model.
        layer: The first block.
        state: What goes into it.
        options: Of every block.
        mask: Of all tokens so far.
        past: Number of tokens in the KV cache.
        kept: What the sequence keeps for later passes; nothing.
    """

    def __init__(
        self,
        host: Any,
        layer: int,
        state: Tensor,
        options: dict[str, Any],
        mask: Tensor | None,
        past: int,
        kept: dict[Any, Any],
    ):
        self.host = host
        self.layer = layer
        self.state = state
        self.options = options | {"attention_mask": mask, "past_kv_cache_entry": None}
        self.past = past

    def states(self, sites: Sequence[Site], *, goes_on: bool) -> dict[Site, Tensor]:
        """The unsteered states of a prompt."""
        require_whole(self.past)
        model = self.host.model

        def run() -> None:
            state = self.state
            for block in model.blocks[self.layer :]:
                state = block(state, **self.options)

        with Bare(model), torch.no_grad():
            return gather({site: (*place_of(module), 0, 1.0) for site, module in self.host.find(sites).items()}, run)

    def tangents(self, sites: Sequence[Site], direction: Direction, *, goes_on: bool) -> dict[Site, Tensor]:
        """Raises NotImplementedError."""
        raise NotImplementedError(OTHER_PARAMETERS)


class FrozenEntry:
    """Stands in for a TransformerLens cache entry during a replay, as `hf.FrozenCache` does for Hugging Face."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.past_keys, self.past_values = keys, values

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Past and new keys and values, `[n pos head d_head]`."""
        return FixedContext.join(self.past_keys, keys, 1), FixedContext.join(self.past_values, values, 1)
