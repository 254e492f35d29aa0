"""Where an nnsight model has what a controller needs; travels to servers, so it names no module of ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from steerlens.core import Pass, Site
from steerlens.hosts.blocks.graph import Place, pooled_gradients
from steerlens.hosts.blocks.hf import nominal
from steerlens.hosts.blocks.nominal import Nominal
from steerlens.hosts.dimensions import Dimensions
from steerlens.hosts.roles import Layout, output_matrix, skeleton, submodule
from steerlens.hosts.traced.edit import Before, Carry, Enter, Mid, Plain, Tap
from steerlens.hosts.weights import adapter_of, device_of, dtype_of, held_apart, is_quantised, matrix_of


class Anatomy(Dimensions):
    """The sizes of a Hugging Face language model behind nnsight, and where its blocks and their points are.

    Raises:
        TypeError: the wrapped module is no language model with a head, or one that cannot be steered.
    """

    def __init__(self, model: Any):
        self.model = model
        module = model._module
        watched, path, blocks, config = skeleton(module)
        self.base = envoy_at(model, watched)
        self.layers = envoy_at(model, path)
        self.layouts = [Layout(block, config) for block in blocks]
        self.n_layers = len(self.layouts)
        self.d_model = config.hidden_size
        self.n_heads = getattr(config, "num_attention_heads", None) or 0
        self.d_head = self._everywhere("z") // max(self.n_heads, 1)
        self.d_mlp = self._everywhere("mlp_post") or None
        self.d_vocab = config.vocab_size
        self.name = str(getattr(getattr(module, "config", None), "_name_or_path", None) or "")
        self.quantised = is_quantised(module)

    def _everywhere(self, point: str) -> int:
        """The width of a point in the first block that has it; 0 where none has."""
        return next((layout.widths[point] or 0 for layout in self.layouts if point in layout.widths), 0)

    @property
    def _place(self) -> torch.device:
        return device_of(self.layers[0]._module)

    @property
    def away(self) -> bool:
        """Whether the weights are on a server only."""
        return self._place.type == "meta"

    @property
    def device(self) -> torch.device:
        """Where the first block computes; the CPU while its weights are on a server only."""
        return torch.device("cpu") if self.away else self._place

    @property
    def dtype(self) -> torch.dtype:
        """In what the first block computes."""
        return dtype_of(self.layers[0]._module)

    def adapter(self) -> list[float]:
        """As `Dimensions.adapter`."""
        return [] if self.away else adapter_of([layer._module for layer in self.layers][::-1])

    def apart(self) -> str | None:
        """As `Dimensions.apart`."""
        return held_apart(layer._module for layer in self.layers)

    def nominal(self, tokens: Sequence[int]) -> Nominal:
        """The unsteered path of the last token."""
        self.need_weights("linearising the blocks")
        return nominal(self.base._module, [layer._module for layer in self.layers], tokens)

    def need_weights(self, what: str, instead: str = "") -> None:
        """Raises NotImplementedError where they are not here."""
        if self.away:
            raise NotImplementedError(f"{what} needs the weights here: build the model with dispatch=True{instead}")

    def missing(self, site: Site) -> str | None:
        """Why there is no such site; on a server without the block's own input, also where that would be needed."""
        layout = self.layouts[site.layer]
        if site.point == "resid_pre" and site.layer == 0 and self.away and (layout.norm is None or layout.parallel):
            return f"is a {layout.kind}, of which no module reads resid_pre alone, and its own input holds the KV cache"
        return layout.missing(site.point)

    def _width(self, site: Site) -> int | None:
        return self.layouts[site.layer].widths.get(site.point)

    def part(self, site: Site) -> Any:
        """The torch module at a site, None where the block has no such site."""
        layout = self.layouts[site.layer]
        known = layout.paths.get(site.point)
        return None if known is None else submodule(self.layers[site.layer]._module, known[0])

    def _probed(self) -> Tensor | None:
        return output_matrix(self.layers[-1]._module, self.layouts[-1])

    def _out_weight(self, layer: int) -> Tensor | None:
        return matrix_of(self.part(Site(layer, "mlp_post")))

    @property
    def entry(self) -> Any:
        """What `follow` takes as `first`."""
        if not self.away:
            return None
        module = self.model._module
        embedding = module.get_input_embeddings()
        return envoy_at(self.model, next(path for path, part in module.named_modules() if part is embedding))

    def taps(self, run: Pass) -> list[Tap]:
        """What the edit must visit, in the order of the forward pass."""
        taps: list[Tap] = []
        for site in run.sites:
            pre, branch = Site(site.layer, "resid_pre"), Site(site.layer, "attn_out")
            if site.point == "resid_mid" and site in run.names:
                taps += [self.tap(pre, Before), self.tap(branch, Mid, site)]
            elif site.point == "resid_pre" and self._by_norm(site) and site in run.names:
                taps += [self.tap(pre, Enter, site), self.tap(branch, Carry)]
            else:
                taps.append(self.tap(site, Plain, site))
        taps.sort(key=lambda tap: tap.order)
        for before, tap in pairwise(taps):
            left, here = before.read, tap.read
            follows = (left.point, here.point, here.layer) == ("resid_post", "resid_pre", left.layer + 1)
            # only a sensor may take the state from the visit before it: what it would write there goes nowhere
            if follows and isinstance(before, Plain) and isinstance(tap, Plain) and tap.steers not in run.names:
                before.then, before.way = tap, (before.envoy, self.layers[here.layer], tap.envoy)
        return taps

    def _by_norm(self, site: Site) -> bool:
        """Whether `resid_pre` is where the block's first norm reads it: on a server, where it can be.

        The output of the block before is a place of its own site already: there the controls of one run at both sites
        would come before those of the next run at either.
        """
        layout = self.layouts[site.layer]
        return self.away and layout.norm is not None and not layout.parallel

    def tap(self, read: Site, kind: type[Tap] = Plain, steers: Site | None = None) -> Tap:
        """One location; `read` and `steers` as in `Tap`."""
        layout, layer = self.layouts[read.layer], read.layer
        path, side = layout.paths[read.point]
        if read.point == "resid_pre" and self.away:
            # the block's own input holds the KV cache, see `Tap`
            layer, path, side = (
                (layer, layout.norm or "", "input") if self._by_norm(read) else (layer - 1, "", "output")
            )
        scale = layout.scale if read.point in ("attn_out", "mlp_out") else 1.0
        heads = self.n_heads if read.point == "z" else 0
        return kind(envoy_at(self.layers[layer], path), side, read, steers, heads, scale)

    def places(self, sites: Sequence[Site]) -> list[Place]:
        """Where a change of each site's activation shows."""
        return [(self.part(site), self.layouts[site.layer].paths[site.point][1]) for site in sites]

    def scales(self, sites: Sequence[Site]) -> list[float]:
        """By what each site's activation is larger than what is at its place."""
        branches = ("attn_out", "mlp_out")
        return [self.layouts[site.layer].scale if site.point in branches else 1.0 for site in sites]


def envoy_at(envoy: Any, path: str | None) -> Any:
    """The envoy of a module inside an envoy's."""
    for name in path.split(".") if path else ():
        envoy = envoy[int(name)] if name.isdigit() else getattr(envoy, name)
    return envoy


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
    device = device_of(module)
    ids, mask = ids.to(device), mask.to(device)

    def forward() -> Tensor:
        return module(input_ids=ids, attention_mask=mask, use_cache=False).logits

    found = pooled_gradients(forward, anatomy.layers[0]._module, anatomy.places(sites), loss, weights)
    return [gradient / scale for gradient, scale in zip(found, anatomy.scales(sites), strict=True)]


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
