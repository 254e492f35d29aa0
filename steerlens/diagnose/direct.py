"""Direct attribution: which write to the residual stream moved the logits, in shares that add up."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import einsum, rearrange
from torch import Tensor

from steerlens.core import Controller, Site
from steerlens.diagnose.attribution import listed
from steerlens.diagnose.components import Components
from steerlens.diagnose.given import given, run
from steerlens.diagnose.metrics import Metric, Metrics, each_metric, measure, metric_name
from steerlens.fit.contrast import Text, tokenize
from steerlens.hosts import Host, host_of
from steerlens.hosts.types import Model

#: A part of the stream: kind, layer, unit.
_Part = tuple[str, int, int]


def direct(
    model: Model,
    controller: Controller,
    metric: Metrics,
    prompts: Sequence[Text],
    *,
    heads: bool = False,
    nodes: int = 8,
    trust: bool = False,
    prepend_bos: bool | None = None,
) -> Components:
    """What each write to the residual stream contributes directly, past all later blocks, to a metric's change.

    The change of the final state is the sum of the changes of what was written, and the controls:

        dx = sum_layers (d attn + d mlp) + sum_loops u

    and the metric's change is its gradient along the straight line from the unsteered to the steered final state x,
    which sees the final norm and the unembedding only. So the shares

        value_c = < integral_0^1 (dm/dx)(x - (1 - s) dx) ds, dc >,      sum_c value_c = m(steered) - m(unsteered)

    add up, whatever the norm, and a write that did not change has none. (Logit attribution at a frozen scale of the
    norm adds up only if each side's own scale is taken; it then credits writes that did not change.)

    Args:
        model: TransformerBridge, HookedTransformer or local nnsight model.
        controller: What steers. A control on heads or neurons counts as part of its branch.
        metric, prompts, trust, prepend_bos: As in `attribute`.
        heads: Attention by head; a model with a norm after attention has no such shares.
        nodes: Of the Gauss-Legendre rule for the integral.

    Returns:
        Components of the kinds `"attn"` (or `"head"`), `"mlp"` and `"control"`; `rest` is rounding and what the rule
        misses.

    Raises:
        NotImplementedError: heads of a model whose attention output passes a norm.

    Source: direct logit attribution (TransformerLens's `logit_attrs`), with the norm integrated as in integrated
    gradients, arXiv 1703.01365.
    """
    host = host_of(model)
    tokens = [tokenize(prompt, host, prepend_bos)[0] for prompt in listed(prompts)]
    metrics = each_metric(metric, len(tokens))
    rows = [
        _one(host, controller, chosen, torch.tensor([ids]), heads, nodes, trust)
        for ids, chosen in zip(tokens, metrics, strict=True)
    ]
    parts = list(rows[0][0])
    values = torch.stack([torch.stack([shares[part] for part in parts]) for shares, _ in rows]).double().cpu()
    total = torch.stack([change for _, change in rows]).double().cpu()
    return Components(
        kinds=tuple(kind for kind, _, _ in parts),
        layers=tuple(layer for _, layer, _ in parts),
        units=tuple(unit for _, _, unit in parts),
        values=values,
        rest=total - values.sum(1),
        whole=total,
        total=total,
        exact=torch.full((len(parts),), torch.nan, dtype=torch.float64),
        metric=metric_name(metric),
        title="Direct effect of what was written to the residual stream",
    )


def _one(
    host: Host, controller: Controller, metric: Metric, ids: Tensor, heads: bool, nodes: int, trust: bool
) -> tuple[dict[_Part, Tensor], Tensor]:
    """Shares of one prompt, and the metric's change."""
    final = Site(host.n_layers - 1, "resid_post")
    layers = range(controller.layers[0], host.n_layers)
    points = ("attn_out", "mlp_out", "z") if heads else ("attn_out", "mlp_out")
    sites = [*(Site(layer, point) for layer in layers for point in points), final]
    probes = Controller([given(torch.zeros(1, ids.shape[1], *host.shape(site)), site) for site in sites])
    with torch.inference_mode(False), torch.no_grad():
        steered, found = run(host, controller + probes, ids, record=("u", "state"), trust=trust)
        plain, before = run(host, probes, ids, record=("state",))
        change = measure(metric, steered)[0] - measure(metric, plain)[0]
    own, after = found[: len(controller.loops)], found[len(controller.loops) :]
    moved = {site: _wide(x["state"]) - _wide(y["state"]) for site, x, y in zip(sites, after, before, strict=True)}
    gradient = _integrate(host, controller, metric, ids, final, moved[final], nodes, trust)
    writes: dict[_Part, Tensor] = {}
    for layer in layers:
        attention = moved[Site(layer, "attn_out")]
        if heads:
            for head, write in enumerate(_heads(host, layer, moved, attention)):
                writes["head", layer, head] = write
        else:
            writes["attn", layer, 0] = attention
        writes["mlp", layer, 0] = moved[Site(layer, "mlp_out")]
    for loop, recorded in zip(controller.loops, own, strict=True):
        layer, point = loop.act.layer, loop.act.point
        if point in ("z", "mlp_post"):
            continue
        u = _wide(recorded["u"])
        branch = {"attn_out": ("attn", layer, 0), "mlp_out": ("mlp", layer, 0)}.get(point)
        if branch in writes:  # what the branch holds there includes it
            writes[branch] = writes[branch] - u
        writes["control", layer, 0] = writes.get(("control", layer, 0), torch.zeros_like(u)) + u
    return {part: (gradient * write).sum() for part, write in writes.items()}, change


def _integrate(
    host: Host, controller: Controller, metric: Metric, ids: Tensor, final: Site, dx: Tensor, nodes: int, trust: bool
) -> Tensor:
    """The mean gradient along the line from the unsteered to the steered final state, `[1 pos d]`."""
    where, weights = _gauss_legendre(nodes)
    with torch.inference_mode(False), torch.enable_grad():
        steps = (rearrange((where - 1).to(dx), "node -> node 1 1") * dx).requires_grad_()
        probe = Controller([given(steps, final)])
        values = measure(metric, run(host, controller + probe, ids.expand(nodes, -1), trust=trust)[0])
        (gradients,) = torch.autograd.grad(values.sum(), steps)
    return einsum(weights.to(dx), gradients, "node, node pos d -> pos d")[None]


def _heads(host: Host, layer: int, moved: dict[Site, Tensor], attention: Tensor) -> list[Tensor]:
    """Changes of what the heads of a layer write, `[1 pos d]` each."""
    z = moved[Site(layer, "z")]
    writes = einsum(z, host.head_writes(layer).to(z), "batch pos head d_head, head d_head d -> head batch pos d")
    off = float((writes.sum(0) - attention).norm())
    if off > 1e-3 * float(attention.norm()) + 1e-6:
        raise NotImplementedError(
            f"the heads of layer {layer} do not add up to what attention writes (a norm or a control in between); "
            "use heads=False"
        )
    return list(writes)


def _wide(x: Tensor) -> Tensor:
    """In float32 at least: small differences of large states."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _gauss_legendre(nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [0, 1] (Golub and Welsch: eigenvalues of the Jacobi matrix)."""
    if nodes < 1:
        raise ValueError(f"nodes={nodes}; the rule needs at least one")
    below = torch.tensor([k / math.sqrt(4 * k * k - 1) for k in range(1, nodes)], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(torch.diag(below, 1) + torch.diag(below, -1))
    return (values + 1) / 2, vectors[0].square()
