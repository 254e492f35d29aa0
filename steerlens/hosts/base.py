"""What every host can do, and what steerlens needs to know of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from steerlens.core import Pass, Site
from steerlens.core.progress import bar
from steerlens.hosts.attachment import Attachment
from steerlens.hosts.batches import pad
from steerlens.hosts.blocks.graph import Place, pooled_gradients
from steerlens.hosts.blocks.turns import turn_of
from steerlens.hosts.dimensions import Dimensions
from steerlens.hosts.readings import readings_of
from steerlens.hosts.steered import unsteered

if TYPE_CHECKING:
    from steerlens.hosts.blocks.learning import Learner
    from steerlens.hosts.blocks.nominal import Nominal


Found = TypeVar("Found")


class UntrustedError(NotImplementedError):
    """A server keeps requests apart from the weights."""


class Host(Dimensions):
    """Abstract: one model behind the few verbs that steerlens needs."""

    library: str
    #: The server on which fits run, or whether they do.
    remote: bool | str = False

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None."""
        raise NotImplementedError

    @property
    def block(self) -> nn.Module:
        """The first block."""
        raise NotImplementedError

    @property
    def prepends_bos(self) -> bool:
        """Whether the library puts BOS before a string by default."""
        raise NotImplementedError

    def attach(self, run: Pass, *, payload_limit: int, timeout_s: float) -> Attachment:
        """Run a pass with every forward call of the model until detached.

        Args:
            payload_limit: Largest request in bytes, on hosts that send them.
            timeout_s: Longest wait for a result, on these hosts.
        """
        raise NotImplementedError

    def learner(self) -> Learner:
        """The model with its parameters as variables.

        Raises:
            NotImplementedError: they are not here, or not those of the model that was published.
        """
        raise NotImplementedError

    def signal_taken(self, name: str) -> bool:
        """Whether a hook point of this name exists already."""
        return False

    def resting(self, make: Callable[[], Nominal]) -> Nominal:
        """A nominal path that is made, and whose blocks are run, while the runs stand down."""
        with self.unsteered():
            nominal = make()
        nominal.blocks = [partial(self._plainly, block) for block in nominal.blocks]
        return nominal

    def _plainly(self, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with self.unsteered():
            return block(x)

    def unsteered(self) -> AbstractContextManager[None]:
        """A context in which the runs that steer the model stand down, for this thread."""
        return unsteered(self.model)

    def beside(self, function: Callable[..., Found], *arguments: Any) -> Found:
        """`function(place, *arguments)` where the weights are: here, or on a server that trusts you.

        Args:
            function: Travels, as its arguments and its result do; `place` has the verbs of `Dimensions`.

        Raises:
            UntrustedError: the server keeps requests apart from the weights.
        """
        return function(self, *arguments)

    def tangents(self, tokens: Sequence[int], directions: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """`v @ A_t'` for directions v before block t, by central differences in one forward pass.

            A v = (f(x + h v) - f(x - h v)) / 2 h,   h = 1e-3 |x| (2e-2 |x| for a 16-bit model),   |v| = 1

        Needs the states only, so that a server allows it that gives no access to the weights.

        Args:
            tokens: Of the text; the direction is added to its last token's state.
            directions: By block, `[m d]`.

        Returns:
            `[m d]` by block, in float32, on the CPU.
        """
        raise NotImplementedError

    def head_writes(self, layer: int) -> Tensor:
        """Of attention, `[head d_head d]`: head h adds `z_h @ W[h]` to its output, before any norm that follows it."""
        raise NotImplementedError

    def _read(self, ids: Tensor, mask: Tensor, weights: Tensor | None, sites: Sequence[Site]) -> list[Tensor]:
        """Activations of one right-padded batch in the order of `sites`, pooled as `pool` does."""
        raise NotImplementedError

    def entrance(self) -> nn.Module:
        """A module that runs once in each forward pass."""
        raise NotImplementedError

    def _places(self, sites: Sequence[Site]) -> tuple[nn.Module, list[Place]]:
        """The module that the residual stream enters first, and where a change of each site's activation shows."""
        raise NotImplementedError

    def _logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits of one right-padded batch, `[batch pos vocab]`."""
        raise NotImplementedError

    def _gradients(
        self, ids: Tensor, mask: Tensor, weights: Tensor, sites: Sequence[Site], loss: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        """Pooled gradients of one right-padded batch, in the order of `sites`, heads not split."""
        entry, places = self._places(sites)
        return pooled_gradients(lambda: self._logits(ids, mask), entry, places, loss, weights)

    # -- shared by all hosts ------------------------------------------------------------------------------------

    def read(
        self,
        tokens: Sequence[Sequence[int]],
        weights: Sequence[Sequence[float]],
        sites: Sequence[Site],
        *,
        batch: int = 16,
    ) -> dict[Site, Tensor]:
        """Pooled activations of texts, without steering: `sum_t w_t x_t` for each.

        Args:
            tokens: Token ids of each text.
            weights: One weight per token; `[0, ..., 0, 1]` reads the last.
            sites: Where to read.
            batch: Texts per forward pass. Rows are padded on the right, where a causal model cannot see it.

        Returns:
            `{site: [text ...]}` in float32 (float64 for a float64 model), on the CPU; inside `readings` what was read
            before.
        """
        kept = readings_of(self)
        if kept is not None:
            return kept.read(self, tokens, weights, sites, batch=batch)
        return self.read_anew(tokens, weights, sites, batch=batch)

    def read_anew(
        self,
        tokens: Sequence[Sequence[int]],
        weights: Sequence[Sequence[float]],
        sites: Sequence[Site],
        *,
        batch: int = 16,
    ) -> dict[Site, Tensor]:
        """As `read`, always by passes of the model."""
        rows = self._rows(tokens, weights, sites, batch)
        return {site: torch.stack([row[index] for row in rows]) for index, site in enumerate(sorted(sites))}

    def states(
        self, tokens: Sequence[Sequence[int]], sites: Sequence[Site], *, batch: int = 16
    ) -> dict[Site, list[Tensor]]:
        """Activations of every token of texts, without steering; arguments as in `read`.

        Returns:
            `{site: one [pos ...] for each text}` in float32 (float64 for a float64 model), on the CPU.
        """
        rows = self._rows(tokens, None, sites, batch)
        return {
            site: [row[index][: len(text)] for row, text in zip(rows, tokens, strict=True)]
            for index, site in enumerate(sorted(sites))
        }

    def _rows(self, tokens: Any, weights: Any, sites: Sequence[Site], batch: int) -> list[list[Tensor]]:
        """What `_read` gives for each text, by site."""
        self.trust(sites)
        longest_first = sorted(range(len(tokens)), key=lambda row: -len(tokens[row]))
        rows: dict[int, list[Tensor]] = {}
        for start in bar(range(0, len(tokens), batch), desc="reading activations"):
            chosen = longest_first[start : start + batch]
            given = [tokens[row] for row in chosen]
            own = [[0.0] * len(text) for text in given] if weights is None else [weights[row] for row in chosen]
            ids, mask, pooled = pad(given, own, self.device)
            with turn_of(self.block), self.unsteered():
                read = self._read(ids, mask, None if weights is None else pooled, sorted(sites))
            for position, row in enumerate(chosen):
                rows[row] = [values[position] for values in read]
        return [rows[row] for row in range(len(tokens))]

    def logits(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits of rows, `[batch pos] -> [batch pos vocab]`, steered by what is attached.

        With a graph if gradients are enabled; no parameter gets a gradient by itself.

        Args:
            ids: Token ids, padded on the right if the rows differ in length.
            mask: 1 for tokens, 0 for pads, `[batch pos]`; None if there are no pads.
        """
        ids = ids.to(self.device)
        return self._logits(ids, torch.ones_like(ids) if mask is None else mask.to(self.device))

    def logits_with_graph(self, ids: Tensor, mask: Tensor) -> Tensor:
        """As `logits`, and gradients flow from them to the tensors of what is attached.

        Raises:
            NotImplementedError: the weights are not on this machine.
        """
        with torch.inference_mode(False), torch.enable_grad():
            return self.logits(ids, mask)

    def sample(self, ids: Tensor, count: int, *, temperature: float) -> Tensor:
        """Prompts of equal length and their continuations, `[batch pos] -> [batch pos+count]` or shorter.

        Steered by what is attached. A row that has ended goes on with end or pad tokens.

        Args:
            ids: Token ids of the prompts, without pads.
            count: Largest number of new tokens.
            temperature: Of the sampling from the whole vocabulary with torch's global generator; 0 is greedy.
        """
        raise NotImplementedError

    def gradients(
        self,
        tokens: Sequence[Sequence[int]],
        weights: Sequence[Sequence[float]],
        sites: Sequence[Site],
        loss: Callable[[Tensor], Tensor],
    ) -> dict[Site, Tensor]:
        """Pooled gradients of a loss with respect to the activations of texts, without steering.

            g_i = sum_t w_it dL / dx_it

        The total derivative: a change at an earlier site acts through the later ones. No parameter gets a gradient.

        Args:
            tokens: Token ids of each text; all go through the model in one pass, padded on the right.
            weights: One weight per token; `[0, ..., 0, 1]` takes the gradient at the last.
            sites: Where the activations are.
            loss: L, from the logits `[text pos vocab]` to a scalar; it must not look at pads.

        Returns:
            `{site: [text ...]}` in float32 (float64 for a float64 model), on the CPU.
        """
        self.trust(sites)
        ordered = sorted(sites)
        ids, mask, pooled = pad(tokens, weights, self.device)
        with turn_of(self.block), self.unsteered():
            found = self._gradients(ids, mask, pooled, ordered, loss)
        return {
            site: gradient.reshape(len(ids), *self.shape(site)).cpu()
            for site, gradient in zip(ordered, found, strict=True)
        }
