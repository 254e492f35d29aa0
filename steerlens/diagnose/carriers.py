"""Which heads, neurons or SAE features pass on what steering did: attribution patching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from steerlens.core import Controller, Site
from steerlens.core.progress import bar
from steerlens.core.types import Autoencoder, Layers
from steerlens.diagnose.attribution import listed
from steerlens.diagnose.components import Components
from steerlens.diagnose.given import given, run
from steerlens.diagnose.metrics import Metric, Metrics, each_metric, measure, metric_name
from steerlens.fit.contrast import Text, tokenize
from steerlens.fit.reading import every_layer
from steerlens.hosts import Host, host_of
from steerlens.hosts.types import Model

Kind: TypeAlias = Literal["head", "neuron", "attn", "mlp"]

#: Kind of a component -> the point whose state it is a slice of.
_POINTS: dict[str, str] = {"head": "z", "neuron": "mlp_post", "attn": "attn_out", "mlp": "mlp_out"}


def carriers(
    model: Model,
    controller: Controller,
    metric: Metrics,
    prompts: Sequence[Text],
    *,
    components: Kind | Autoencoder = "head",
    layers: Layers = None,
    check: int = 0,
    batch: int = 16,
    trust: bool = False,
    prepend_bos: bool | None = None,
) -> Components:
    """Which heads, neurons, branches or SAE features carry what steering did to a metric, estimated by gradient.

        value_c = sum_t < d m / d x_c at the steered pass, x_c steered - x_c unsteered >

    the first-order estimate of the loss of effect when component c alone is set to its unsteered activation:
    `m(steered) - m(steered, c unsteered)`. With `check=k` that experiment is also run for the k largest. The loops
    after c measure the change and react, in both. Components do not add up to the effect, since several may carry the
    same part of it. For shares that add up see `direct`.

    Args:
        model: TransformerBridge, HookedTransformer or local nnsight model.
        controller: What steers.
        metric, prompts, trust, prepend_bos: As in `attribute`.
        components: `"head"` (z), `"neuron"` (the input of the MLP's output matrix), `"attn"`, `"mlp"` (what the
            branches add), or an SAE of sae-lens: its features at the hook point that its metadata names, through its
            decoder; what it does not explain is in `rest`.
        layers: Which to look at; default those from the first control on, before which nothing changes.
        check: How many of the largest to patch.
        batch: Rows of a forward pass of the check.

    Raises:
        TypeError: `components` is neither a known name nor an SAE.
        ValueError: an SAE without a hook name that steerlens knows, or of another width than its site.

    Source: attribution patching, arXiv 2310.10348; with SAE features arXiv 2403.19647.
    """
    host = host_of(model)
    tokens = [tokenize(prompt, host, prepend_bos)[0] for prompt in listed(prompts)]
    metrics = each_metric(metric, len(tokens))
    view = _view(host, controller, components, layers)
    passes = [
        _differentiate(host, controller, view, chosen, torch.tensor([ids]), trust)
        for ids, chosen in bar(list(zip(tokens, metrics, strict=True)), desc="differentiating")
    ]
    shares = [torch.cat([view.share(g, *x) for g, x in sites]) for sites, _, _ in passes]
    changes = [torch.stack([(g * (x - y)).sum() for g, (x, y) in sites]).sum() for sites, _, _ in passes]
    values, whole = torch.stack(shares).double().cpu(), torch.stack(changes).double().cpu()
    total = torch.stack([steered - plain for _, steered, plain in passes]).double().cpu()
    counts = [len(view.share(g, *x)) for g, x in passes[0][0]]
    exact = torch.full((values.shape[1],), torch.nan, dtype=torch.float64)
    chosen = values.mean(0).abs().argsort(descending=True, stable=True)[:check].tolist()
    places = [(number, unit) for number, count in enumerate(counts) for unit in range(count)]
    if chosen:
        losses = []
        for ids, one, (sites, with_all, _) in zip(tokens, metrics, passes, strict=True):
            left = _patch(host, controller, view, one, ids, sites, [places[index] for index in chosen], batch, trust)
            losses.append(with_all.double().cpu() - left)
        exact[chosen] = torch.stack(losses).mean(0)
    return Components(
        kinds=(view.kind,) * len(places),
        layers=tuple(view.sites[number].layer for number, _ in places),
        units=tuple(unit for _, unit in places),
        values=values,
        rest=whole - values.sum(1),
        whole=whole,
        total=total,
        exact=exact,
        metric=metric_name(metric),
        title=f"Which {view.kind} carries it: estimated loss of effect without its change",
    )


class _View:
    """How a state is divided into components: the units are the last dimension but those of one component."""

    def __init__(self, kind: str, sites: list[Site]):
        self.kind, self.sites = kind, sites

    def share(self, gradient: Tensor, steered: Tensor, unsteered: Tensor) -> Tensor:
        """Values of the components at one site, `[1 pos ...]` each -> `[unit]`."""
        product = gradient * (steered - unsteered)
        if self.kind == "neuron":
            return product.sum((0, 1))
        return product.sum((0, 1, 3)) if self.kind == "head" else product.sum()[None]

    def restore(self, unit: int, steered: Tensor, unsteered: Tensor) -> Tensor:
        """What to add to put one component back, `[1 pos ...]`."""
        back = unsteered - steered
        if self.kind not in ("head", "neuron"):
            return back
        kept = torch.zeros_like(back)
        kept[:, :, unit] = back[:, :, unit]
        return kept


class _SaeView(_View):
    """The features of an SAE."""

    def __init__(self, sae: Autoencoder, site: Site):
        super().__init__("feature", [site])
        self.sae = sae

    def share(self, gradient: Tensor, steered: Tensor, unsteered: Tensor) -> Tensor:
        """Through the decoder, whatever it does besides its matrix."""
        a, b = self._encode(steered), self._encode(unsteered)
        with torch.enable_grad():
            a = a.requires_grad_()
            (slope,) = torch.autograd.grad(self._decode(a), a, gradient)
        return (slope * (a.detach() - b)).sum((0, 1))

    def restore(self, unit: int, steered: Tensor, unsteered: Tensor) -> Tensor:
        """The feature's change, decoded, taken back; the SAE's error stays."""
        a = self._encode(steered)
        changed = a.clone()
        changed[..., unit] = self._encode(unsteered)[..., unit]
        with torch.no_grad():
            return self._decode(changed) - self._decode(a)

    def _encode(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.sae.encode(x)

    def _decode(self, a: Tensor) -> Tensor:
        return self.sae.decode(a)


def _view(host: Host, controller: Controller, components: str | Autoencoder, layers: Layers) -> _View:
    if not controller.loops:
        raise ValueError("the controller has no loops; nothing steers")
    if isinstance(components, str):
        if components not in _POINTS:
            raise TypeError(f"components={components!r}; it is one of {', '.join(_POINTS)}, or an SAE of sae-lens")
        first = controller.layers[0]
        chosen = list(range(first, host.n_layers)) if layers is None else every_layer(host, layers)
        sites = [Site(layer, _POINTS[components]) for layer in chosen]
        host.check(sites)
        return _View(components, sites)
    if not all(hasattr(components, name) for name in ("encode", "decode", "cfg")):
        raise TypeError(
            f"components is a {type(components).__name__}; give {', '.join(_POINTS)}, or an SAE of sae-lens"
        )
    if layers is not None:
        raise ValueError("an SAE's features are at one layer, which its metadata names; leave layers out")
    name = components.cfg.metadata.hook_name
    if not isinstance(name, str):
        raise ValueError("the SAE's metadata has no hook_name; set sae.cfg.metadata.hook_name")
    site = Site.parse(name)
    host.check([site])
    width = torch.Size(host.shape(site)).numel()
    if components.cfg.d_in != width:
        raise ValueError(f"the SAE reads {components.cfg.d_in} numbers, '{site}' has {width} in this model")
    return _SaeView(components, site)


#: The gradient at a site, and its state steered and unsteered.
_Sites = list[tuple[Tensor, tuple[Tensor, Tensor]]]


def _differentiate(
    host: Host, controller: Controller, view: _View, metric: Metric, ids: Tensor, trust: bool
) -> tuple[_Sites, Tensor, Tensor]:
    """Gradients and states at the view's sites, and the metric steered and unsteered."""
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [torch.zeros(1, ids.shape[1], *host.shape(site), requires_grad=True) for site in view.sites]
        probes = Controller([given(leaf, site) for leaf, site in zip(leaves, view.sites, strict=True)])
        logits, recorded = run(host, controller + probes, ids, record=("state",), trust=trust)
        value = measure(metric, logits)[0]
        gradients = torch.autograd.grad(value, leaves)
        steered = [own["state"] for own in recorded[len(controller.loops) :]]
        with torch.no_grad():
            logits, recorded = run(host, probes, ids, record=("state",))
            plain = measure(metric, logits)[0]
    states = [(x, own["state"]) for x, own in zip(steered, recorded, strict=True)]
    # leaves are on the CPU, and so are their gradients
    sites = [(g.to(x[0]), x) for g, x in zip(gradients, states, strict=True)]
    return sites, value.detach(), plain


def _patch(
    host: Host,
    controller: Controller,
    view: _View,
    metric: Metric,
    ids: list[int],
    sites: _Sites,
    places: list[tuple[int, int]],
    batch: int,
    trust: bool,
) -> Tensor:
    """The metric of steered passes in which one component each is unsteered, `[place]`."""
    values = []
    with torch.inference_mode(False), torch.no_grad():
        for start in bar(range(0, len(places), batch), desc="leaving out"):
            part = places[start : start + batch]
            loops = []
            for number in sorted({number for number, _ in part}):
                x, y = sites[number][1]
                u = torch.cat(
                    [view.restore(unit, x, y) if other == number else torch.zeros_like(x) for other, unit in part]
                )
                loops.append(given(u, view.sites[number]))
            rows = torch.tensor([ids] * len(part))
            values.append(measure(metric, run(host, controller + Controller(loops), rows, trust=trust)[0]))
    return torch.cat(values).double().cpu()
