"""What a HookedTransformer needs in addition to a pass: an unsteered one, and caches that do not grow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from steerlens.core import Companion, Direction, Site
from steerlens.hosts.blocks.bare import Bare
from steerlens.hosts.blocks.context import FixedContext
from steerlens.hosts.blocks.second_pass import gather
from steerlens.hosts.blocks.text import text_of
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
        kept: What earlier passes of the sequence left: keys and values of its own.
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
        self.options = options | {"attention_mask": mask}
        self.past = past
        self.kept = kept

    def states(self, sites: Sequence[Site], *, goes_on: bool) -> dict[Site, Tensor]:
        """The unsteered states of the call's tokens; with keys and values of their own if the sequence goes on.

        If those lack what came before, the states are those of the whole text.
        """
        model, entering = self.host.model, self.state
        entries: Entries | None = self.kept.get("states")
        if self.past == 0 or entries is None or entries.length != self.past:
            if self.past:
                whole = text_of(self.kept, self.past).whole(self.past + self.state.shape[1])
                entering, self.options["shortformer_pos_embed"] = whole["state"], whole.get("positions")
            entries = self._begun() if self.past or goes_on else Entries({})
        held = entries.blocks

        def run() -> None:
            state = entering
            for index, block in enumerate(model.blocks[self.layer :], self.layer):
                state = block(state, past_kv_cache_entry=held.get(index), **self.options)

        with Bare(model), torch.no_grad():
            return gather({site: (*place_of(module), 0, 1.0) for site, module in self.host.find(sites).items()}, run)

    def note(self) -> None:
        """Keep what goes into the blocks."""
        piece = {"state": self.state.detach(), "positions": self.options.get("shortformer_pos_embed")}
        text_of(self.kept, self.past).add(self.past, piece)

    def _begun(self) -> Entries:
        """Keys and values of a text that begins."""
        like = self.state.new_zeros(len(self.state), 0, *_heads(self.host.model.cfg))
        blocks = range(self.layer, self.host.n_layers)
        entries = self.kept["states"] = Entries({block: KeptEntry(like, like) for block in blocks})
        return entries

    def tangents(self, sites: Sequence[Site], direction: Direction, *, goes_on: bool) -> dict[Site, Tensor]:
        """Raises NotImplementedError."""
        raise NotImplementedError(OTHER_PARAMETERS)


class KeptEntry:
    """A TransformerLens cache entry of the unsteered pass: grows by concatenation, in the state's own dtype.

    Upstream: TransformerLens takes `cfg.dtype`, which `model.to(dtype)` leaves alone; goes with HookedTransformer.
    """

    def __init__(self, keys: Tensor, values: Tensor):
        self.past_keys, self.past_values = keys, values

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Past and new keys and values, `[batch pos head d_head]`."""
        self.past_keys, self.past_values = (
            torch.cat(pair, dim=1) for pair in ((self.past_keys, keys), (self.past_values, values))
        )
        return self.past_keys, self.past_values


class Entries:
    """What a sequence keeps for its references: keys and values of every block.

    Args:
        blocks: By number.
    """

    def __init__(self, blocks: dict[int, KeptEntry]):
        self.blocks = blocks

    @property
    def length(self) -> int:
        """Number of tokens in it."""
        return max((entry.past_keys.shape[1] for entry in self.blocks.values()), default=0)

    def rows(self, index: Tensor) -> None:
        """Take other rows, `[new batch]`."""
        self._each(lambda side: side[index.to(side.device)])

    def cut(self, column: int) -> None:
        """Forget the columns from this one on."""
        self._each(lambda side: side[:, :column])

    def fork(self) -> Entries:
        """A copy that goes on by itself; the tensors are never written to."""
        return Entries({block: KeptEntry(entry.past_keys, entry.past_values) for block, entry in self.blocks.items()})

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        for entry in self.blocks.values():
            entry.past_keys, entry.past_values = change(entry.past_keys), change(entry.past_values)


def _heads(cfg: Any) -> tuple[int, int]:
    """Number of heads of the keys, and their width."""
    return getattr(cfg, "n_key_value_heads", None) or cfg.n_heads, cfg.d_head


class FrozenEntry:
    """Stands in for a TransformerLens cache entry during a replay, as `hf.FrozenCache` does for Hugging Face."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.past_keys, self.past_values = keys, values

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Past and new keys and values, `[n pos head d_head]`."""
        return FixedContext.join(self.past_keys, keys, 1), FixedContext.join(self.past_values, values, 1)
