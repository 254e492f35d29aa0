"""What every host can do, and what steerlens needs to know of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from steerlens.core import Pass, Site
from steerlens.hosts.graph import Place, differentiate
from steerlens.hosts.nominal import Nominal

if TYPE_CHECKING:
    from steerlens.hosts.learning import Learner


class Attachment:
    """A pass that is attached to a model; `detach` takes it off and leaves nothing behind."""

    @property
    def payload_bytes(self) -> int | None:
        """Size of the latest request to a server, on hosts that send any."""
        return None

    def detach(self) -> None:
        """Remove every hook and edit; calling it twice is harmless."""
        raise NotImplementedError


class Host:
    """Abstract: one model behind the few verbs that steerlens needs.

    Attributes:
        model: The user's object.
        n_layers, d_model, n_heads, d_head, d_mlp, d_vocab: Its dimensions; `n_heads` counts query heads.
        processed: Whether the weights were folded or centred, which changes the basis of the residual stream.
    """

    library: str
    model: Any
    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_mlp: int | None
    d_vocab: int
    processed: bool = False

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the first block's weights are."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first block's weights."""
        raise NotImplementedError

    @property
    def prepends_bos(self) -> bool:
        """Whether the library puts BOS before a string by default."""
        raise NotImplementedError

    def points(self) -> Sequence[str]:
        """Points of `core.POINTS` that this model offers."""
        raise NotImplementedError

    def attach(self, run: Pass, *, payload_limit: int) -> Attachment:
        """Run a pass with every forward call of the model until detached.

        Args:
            payload_limit: Largest request in bytes, on hosts that send them.
        """
        raise NotImplementedError

    def neuron_writes(self, layer: int) -> Tensor:
        """What one unit of each neuron's `mlp_post` writes, `[d_mlp d_model]`, before any norm of the branch.

        Raises:
            NotImplementedError: the weights are not here, or the block has no such matrix.
        """
        weight = self._out_weight(layer)
        if weight is None or weight.device.type == "meta":
            raise NotImplementedError("the output weights of the MLP are not here; build the model with its weights")
        return weight.detach() if weight.shape[0] == self.d_mlp else weight.detach().T

    def _out_weight(self, layer: int) -> Tensor | None:
        """The output matrix of a block's MLP, whichever way round it is stored; None where there is none."""
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

    def nominal(self, tokens: Sequence[int]) -> Nominal:
        """The unsteered path of the last token through the blocks, its context frozen."""
        raise NotImplementedError

    def probe(self) -> list[float] | None:
        """A few weights of the last block that fine-tuning changes and folding does not; None if they are not here."""
        weight = self._out_weight(self.n_layers - 1)
        if weight is None or weight.device.type == "meta":
            return None
        # whichever way round it is stored
        row = weight[0, :8] if weight.shape[0] == self.d_model else weight[:8, 0]
        return [round(float(value), 6) for value in row.detach().float()]

    def output_matrix(self, layer: int) -> Tensor:
        """Of attention, `[head d_head d]`: head h adds `z_h @ W[h]` to its output, before any norm that follows it."""
        raise NotImplementedError

    def _read(self, ids: Tensor, mask: Tensor, weights: Tensor, sites: Sequence[Site]) -> list[Tensor]:
        """Pooled activations of one right-padded batch, `[batch ...]` each, in the order of `sites`."""
        raise NotImplementedError

    def _places(self, sites: Sequence[Site]) -> tuple[nn.Module, list[Place]]:
        """The module that the residual stream enters first, and where a change of each site's activation shows."""
        raise NotImplementedError

    def _logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits of one right-padded batch, `[batch pos vocab]`."""
        raise NotImplementedError

    # -- shared by all hosts ------------------------------------------------------------------------------------

    def shape(self, site: Site) -> tuple[int, ...]:
        """Shape of the state at a site, without batch and position."""
        if site.point == "z":
            return self.n_heads, self.d_head
        if site.point == "mlp_post":
            return (self.d_mlp or 0,)
        return (self.d_model,)

    def check(self, sites: Iterable[Site]) -> None:
        """Raises ValueError for a layer or point that the model does not have."""
        points = self.points()
        for site in sites:
            if site.layer >= self.n_layers:
                last = self.n_layers - 1
                raise ValueError(
                    f"no hook point '{site}' in a model of {self.n_layers} layers; the last is blocks.{last}"
                )
            if site.point not in points:
                raise ValueError(
                    f"this {type(self.model).__name__} offers no {site.point!r}; it has {', '.join(points)}"
                )

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
            `{site: [text ...]}` in float32 (float64 for a float64 model), on the CPU.
        """
        self.check(sites)
        ordered = sorted(sites)
        longest_first = sorted(range(len(tokens)), key=lambda row: -len(tokens[row]))
        rows: dict[int, list[Tensor]] = {}
        for start in range(0, len(tokens), batch):
            chosen = longest_first[start : start + batch]
            ids, mask, pooled = pad([tokens[row] for row in chosen], [weights[row] for row in chosen], self.device)
            read = self._read(ids, mask, pooled, ordered)
            for position, row in enumerate(chosen):
                rows[row] = [values[position] for values in read]
        return {
            site: torch.stack([rows[row][index] for row in range(len(tokens))]) for index, site in enumerate(ordered)
        }

    def logits(self, ids: Tensor) -> Tensor:
        """Logits of rows without pads, `[batch pos] -> [batch pos vocab]`, steered by what is attached.

        With a graph where gradients are enabled; no parameter gets a gradient by itself.
        """
        ids = ids.to(self.device)
        return self._logits(ids, torch.ones_like(ids))

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
        self.check(sites)
        ordered = sorted(sites)
        ids, mask, pooled = pad(tokens, weights, self.device)
        entry, places = self._places(ordered)
        with torch.inference_mode(False), torch.enable_grad():
            found = differentiate(lambda: self._logits(ids, mask), entry, places, loss)
        return {
            site: pool(gradient, pooled).reshape(len(ids), *self.shape(site)).cpu()
            for site, gradient in zip(ordered, found, strict=True)
        }

    def fingerprint(self) -> dict[str, Any]:
        """What tells whether a controller fitted on one model may be attached to another."""
        return {
            "n_layers": self.n_layers,
            "d_model": self.d_model,
            "n_heads": self.n_heads,
            "d_vocab": self.d_vocab,
            "processed": self.processed,
            "probe": self.probe(),
        }

    def differences(self, fingerprint: dict[str, Any]) -> list[str]:
        """How this model differs from the one a controller was fitted on, in words; empty where it does not."""
        mine, found = self.fingerprint(), []
        for key in ("n_layers", "d_model", "n_heads", "d_vocab"):
            if key in fingerprint and fingerprint[key] != mine[key]:
                found.append(f"{key} is {mine[key]}, it was {fingerprint[key]}")
        if fingerprint.get("processed", self.processed) != self.processed:
            was, now = ("raw", "processed") if self.processed else ("processed", "raw")
            found.append(f"this model has {now} weights, it was fitted on {was} ones (folded norms, centred writes)")
        theirs, ours = fingerprint.get("probe"), mine["probe"]
        if not found and theirs and ours and not _close(theirs, ours):
            found.append("the weights differ (same architecture, other training)")
        return found


def pad(tokens: Any, weights: Any, device: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, mask and pooling weights of some texts, `[text pos]` each, padded on the right."""
    longest = max(len(row) for row in tokens)
    ids = torch.zeros(len(tokens), longest, dtype=torch.long)
    mask = torch.zeros(len(tokens), longest, dtype=torch.long)
    pooled = torch.zeros(len(tokens), longest, dtype=torch.float64)
    for row, (text, weight) in enumerate(zip(tokens, weights, strict=True)):
        ids[row, : len(text)] = torch.as_tensor(text)
        mask[row, : len(text)] = 1
        pooled[row, : len(text)] = torch.as_tensor(weight, dtype=torch.float64)
    return ids.to(device), mask.to(device), pooled.to(device)


def pool(x: Tensor, weights: Tensor) -> Tensor:
    """`sum_t w_t x_t`: `[batch pos ...], [batch pos] -> [batch ...]`, in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, weights = x.to(dtype), weights.to(device=x.device, dtype=dtype)
    weights = weights.reshape(*weights.shape, *[1] * (x.ndim - 2))
    # a pad may hold anything, also NaN
    return torch.where(weights != 0, weights * x, 0.0).sum(1)


def _close(a: Sequence[float], b: Sequence[float]) -> bool:
    scale = math.sqrt(sum(value * value for value in a)) or 1.0
    # bfloat16 keeps eight bits: two copies of one model in different dtypes agree to 1e-2
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True))) / scale < 2e-2
