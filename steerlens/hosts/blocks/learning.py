"""The parameters of a Hugging Face model as variables: gradients of a loss on them, and what a step along one does."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from steerlens.core import Direction, Site
from steerlens.hosts.batches import pad
from steerlens.hosts.blocks.graph import pool
from steerlens.hosts.blocks.second_pass import BaseCompanion, Call, SecondPass, Spot, everywhere, named_parameters
from steerlens.hosts.blocks.turns import turn_of

_BLOCK = re.compile(r"(?:layers|h)\.(\d+)\.")
#: Llama's and Gemma's token embedding, GPT-2's of tokens and of positions.
_EMBEDDING = re.compile(r"embed_tokens|wte|wpe")

#: From token ids and mask `[text pos]` to logits.
Logits = Callable[[Tensor, Tensor], Tensor]


class Learner:
    """A model whose parameters may be differentiated; none of them, nor its `grad` or `requires_grad`, is changed.

    Args:
        model: A Hugging Face model with a head, whose modules TransformerBridge or nnsight may have wrapped.
        aside: Makes a context in which a call of it is plain: neither steered nor seen by hooks.
        spots: Where each site's state is.
    """

    def __init__(
        self,
        model: nn.Module,
        aside: Callable[[], Any],
        spots: Callable[[Sequence[Site]], dict[Site, Spot]],
    ):
        self.model = model
        self.base: nn.Module = model.base_model  # type: ignore[assignment]
        self.aside = aside
        self.second = SecondPass(self.base, aside, spots)
        self.device = next(model.parameters()).device
        self.turn = turn_of(next(part for part in self.base.modules() if isinstance(part, nn.ModuleList))[0])

    def gradient(
        self, losses: Iterable[Callable[[Logits], Tensor]], layer: int, embedding: str | None
    ) -> tuple[Direction, float]:
        """The gradient of a sum of losses with respect to the embedding and the blocks up to `layer`.

        Args:
            losses: Each gets the model as a function and returns a scalar.
            layer: The last block.
            embedding: `"tied"`: where input and output embedding share a matrix, the gradient is that of both uses.
                `"untied"`: of its use at the input. None: the embedding is held fixed.

        Returns:
            The gradient divided by its Euclidean norm, in float32 at least, and the norm.

        Raises:
            ValueError: the gradient is zero or not finite.
        """
        leaves = {
            name: value.detach().requires_grad_()
            for name, value in named_parameters(self.base).items()
            if self._chosen(name, layer, embedding)
        }
        changed = self._everywhere(leaves, self.base if embedding == "untied" else self.model)

        def logits(ids: Tensor, mask: Tensor) -> Tensor:
            call = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
            return functional_call(self.model, changed, (), call, tie_weights=False).logits

        total: dict[str, Tensor] = {}
        with self.turn, self.aside(), torch.inference_mode(False), torch.enable_grad():
            for loss in losses:
                gradients = torch.autograd.grad(loss(logits), list(leaves.values()), allow_unused=True)
                for name, gradient in zip(leaves, gradients, strict=True):
                    if gradient is not None:
                        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                        total[name] = total[name].add_(gradient) if name in total else gradient.clone()
        norm = sum(float(value.double().square().sum()) for value in total.values()) ** 0.5
        if norm == 0:
            raise ValueError("the loss has no gradient at the parameters; do its labels depend on the model at all?")
        if norm != norm or norm == float("inf"):
            raise ValueError("the gradient of the parameters is not finite; is the model's dtype too narrow?")
        return Direction(list(total), [value / norm for value in total.values()]), norm

    def norm(self, names: Sequence[str]) -> float:
        """Euclidean norm of some of the parameters together."""
        parameters = named_parameters(self.base)
        return sum(float(parameters[name].detach().double().square().sum()) for name in names) ** 0.5

    def tangents(
        self,
        tokens: Sequence[Sequence[int]],
        weights: Sequence[Sequence[float]],
        sites: Sequence[Site],
        direction: Direction,
        *,
        batch: int = 4,
    ) -> dict[Site, Tensor]:
        """Pooled changes of the activations of texts along a direction of the parameters: `sum_t w_t dx_t`.

        Returns:
            `{site: [text ...]}` in float32 at least, on the CPU.
        """
        rows: dict[Site, list[Tensor]] = {site: [] for site in sites}
        for start in range(0, len(tokens), batch):
            chosen = slice(start, start + batch)
            ids, mask, pooled = pad(tokens[chosen], weights[chosen], self.device)
            call = Call((), {"input_ids": ids, "attention_mask": mask}, past=0)
            companion = BaseCompanion(self.second, call, {})
            with self.turn:
                found = companion.tangents(sites, direction, goes_on=False)
            for site, value in found.items():
                rows[site].append(pool(value, pooled).cpu())
        return {site: torch.cat(values) for site, values in rows.items()}

    def _chosen(self, name: str, layer: int, embedding: str | None) -> bool:
        block = _BLOCK.match(name)
        return int(block[1]) <= layer if block else embedding is not None and bool(_EMBEDDING.match(name))

    def _everywhere(self, leaves: dict[str, Tensor], scope: nn.Module) -> dict[str, Tensor]:
        """The leaves under every name that `scope` has for their parameters."""
        prefix = next(name for name, module in self.model.named_modules() if module is scope)
        places, parameters = everywhere(scope, prefix), named_parameters(self.base)
        return {place: leaf for name, leaf in leaves.items() for place in places[id(parameters[name])]}
