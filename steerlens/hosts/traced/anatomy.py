"""Where an nnsight model has what a controller needs; travels to servers, so it names no module of ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from steerlens.core import POINTS, Pass, Site
from steerlens.hosts.blocks.graph import Place, pooled_gradients
from steerlens.hosts.blocks.hf import nominal
from steerlens.hosts.blocks.nominal import Nominal
from steerlens.hosts.dimensions import Dimensions
from steerlens.hosts.roles import family_paths, layers_path
from steerlens.hosts.traced.edit import Tap


class Anatomy(Dimensions):
    """The sizes of a Hugging Face language model behind nnsight, and where its blocks and their points are.

    Raises:
        TypeError: the wrapped module is no language model with a head, or of no known family.
    """

    def __init__(self, model: Any):
        self.model = model
        module = model._module
        config = getattr(module, "config", None)
        if config is None or getattr(module, "base_model", module) is module:
            kind = type(module).__name__
            raise TypeError(f"{kind} is no Hugging Face language model with a head; wrap one with TransformersModel")
        config = config.get_text_config()
        self.n_layers = config.num_hidden_layers
        self.d_model = config.hidden_size
        self.n_heads = config.num_attention_heads
        self.d_head = getattr(config, "head_dim", None) or self.d_model // self.n_heads
        self.d_mlp = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * self.d_model
        self.d_vocab = config.vocab_size
        self.base = getattr(model, module.base_model_prefix)
        self.layers = getattr(self.base, layers_path(self.base._module))
        self.paths = family_paths(self.layers[0]._module)

    @property
    def _weight(self) -> Tensor:
        return next(self.layers[0]._module.parameters())

    @property
    def away(self) -> bool:
        """Whether the weights are on a server only."""
        return self._weight.device.type == "meta"

    @property
    def device(self) -> torch.device:
        """Where the first block's weights are; the CPU while they are on a server only."""
        return torch.device("cpu") if self.away else self._weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first block's weights."""
        return self._weight.dtype

    def nominal(self, tokens: Sequence[int]) -> Nominal:
        """The unsteered path of the last token."""
        self.need_weights("linearising the blocks")
        return nominal(self.base._module, [layer._module for layer in self.layers], tokens)

    def need_weights(self, what: str, instead: str = "") -> None:
        """Raises NotImplementedError where they are not here."""
        if self.away:
            raise NotImplementedError(f"{what} needs the weights here: build the model with dispatch=True{instead}")

    def points(self) -> Sequence[str]:
        """All of them, in every family that is known."""
        return POINTS

    def _out_weight(self, layer: int) -> Tensor | None:
        return getattr(self.layers[layer]._module.get_submodule(self.paths["mlp_post"][0]), "weight", None)

    @property
    def entry(self) -> Any:
        """What `follow` takes as `first`."""
        return self.tap(Site(0, "resid_pre")).envoy if self.away else None

    def taps(self, run: Pass) -> list[Tap]:
        """What the edit must visit, in the order of the forward pass."""
        taps = []
        for site in run.sites:
            pre, branch = Site(site.layer, "resid_pre"), Site(site.layer, "attn_out")
            if site.point == "resid_mid" and site in run.names:
                taps += [self.tap(pre, Tap.BEFORE), self.tap(branch, Tap.MID, site)]
            elif site.point == "resid_pre" and site in run.names:
                taps += [self.tap(pre, Tap.ENTER, site), self.tap(branch, Tap.CARRY)]
            else:
                taps.append(self.tap(site, Tap.PLAIN, site))
        taps.sort(key=lambda tap: tap.order)
        for before, tap in pairwise(taps):
            left, here = before.read, tap.read
            follows = (left.point, here.point, here.layer) == ("resid_post", "resid_pre", left.layer + 1)
            if follows and before.role == tap.role == Tap.PLAIN:
                before.then, before.way = tap, (before.envoy, self.layers[here.layer], tap.envoy)
        return taps

    def tap(self, read: Site, role: int = Tap.PLAIN, steers: Site | None = None) -> Tap:
        """One location; arguments as in `Tap`."""
        path, side = self.paths[read.point]
        envoy = self.layers[read.layer]
        for name in path.split(".") if path else ():
            envoy = getattr(envoy, name)
        return Tap(envoy, side, read, role, steers, self.n_heads if read.point == "z" else 0)

    def places(self, sites: Sequence[Site]) -> list[Place]:
        """Where a change of each site's activation shows."""
        found = []
        for site in sites:
            path, side = self.paths[site.point]
            found.append((self.layers[site.layer]._module.get_submodule(path), side))
        return found


def gradients_at(
    anatomy: Anatomy,
    ids: Tensor,
    mask: Tensor,
    weights: Tensor,
    sites: Sequence[Site],
    loss: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """Pooled gradients of one right-padded batch where the weights are, arguments as in `Host.gradients`.

    Raises:
        NotImplementedError: they are not in this process.
    """
    need_weights_beside(anatomy, "it takes no gradients")
    module = anatomy.model._module
    device = next(module.parameters()).device
    ids, mask = ids.to(device), mask.to(device)

    def forward() -> Tensor:
        return module(input_ids=ids, attention_mask=mask, use_cache=False).logits

    return pooled_gradients(forward, anatomy.layers[0]._module, anatomy.places(sites), loss, weights)


def call_beside(anatomy: Anatomy, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """`function(anatomy, *arguments)` where the weights are.

    Raises:
        NotImplementedError: they are not in this process.
    """
    need_weights_beside(anatomy, "nothing is linearised there")
    return function(anatomy, *arguments)


def need_weights_beside(anatomy: Anatomy, what: str) -> None:
    """Raises NotImplementedError in a server's process that has no weights."""
    if anatomy.model._module is None or anatomy.away:
        raise NotImplementedError(
            f"this server {UNTRUSTED}, so {what}; fit on local weights, save the controller and load it here"
        )


#: What a server's refusal is recognised by.
UNTRUSTED = "keeps your requests apart from the weights (untrusted)"
