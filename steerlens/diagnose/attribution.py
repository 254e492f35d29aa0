"""Which layer's control caused how much of what steering did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steerlens.core import Controller
from steerlens.core.progress import bar
from steerlens.core.types import Figure, Frame
from steerlens.diagnose.given import Weighted, given, run
from steerlens.diagnose.metrics import Metric, Metrics, each_metric, measure, metric_name
from steerlens.diagnose.result import frame
from steerlens.fit.contrast import Text, tokenize
from steerlens.hosts import Host, host_of
from steerlens.hosts.types import Model
from steerlens.plots import load_plotly

BY = ("layer", "loop")
OTHERS = ("react", "held")


@dataclass(frozen=True)
class Attribution:
    """Effects of the parts of a controller on a metric, all in the metric's unit.

    Attributes:
        labels: Names of the parts, as `"12"` for a layer.
        layers: Layer of each part.
        effects: Leaving one out, `m(all) - m(all but this one)`, `[prompt part]`; NaN where not asked for.
        estimates: The gradient's estimate of the same, `[prompt part]`.
        steered, unsteered: The metric with all controls and with none, `[prompt]`.
        metric: Name of the metric.
        others: What the other loops did meanwhile, see `attribute`.
    """

    labels: tuple[str, ...]
    layers: tuple[int, ...]
    effects: Tensor
    estimates: Tensor
    steered: Tensor
    unsteered: Tensor
    metric: str
    others: str

    @property
    def effect(self) -> Tensor:
        """Leaving one out, mean over the prompts, `[part]`."""
        return self.effects.mean(0)

    @property
    def estimate(self) -> Tensor:
        """The gradient's estimate, mean over the prompts, `[part]`."""
        return self.estimates.mean(0)

    @property
    def total(self) -> float:
        """What steering changed, `m(all) - m(none)`, mean over the prompts."""
        return float((self.steered - self.unsteered).mean())

    @property
    def interaction(self) -> float:
        """What the parts do not add up to: `total` minus the sum of `effect`.

        Positive if controls can replace one another (each alone is dispensable), negative if they need one another.
        """
        return self.total - float(self.effect.sum())

    @property
    def correlation(self) -> float:
        """Pearson correlation of `estimates` with `effects` over all parts of all prompts; NaN for fewer than two."""
        pairs = torch.stack([self.effects.flatten(), self.estimates.flatten()])
        return float(torch.corrcoef(pairs)[0, 1]) if pairs.shape[1] > 1 else float("nan")

    def table(self) -> Frame:
        """One row a part, a pandas DataFrame."""
        columns = {"part": self.labels, "layer": self.layers, "exact": self.effect, "gradient": self.estimate}
        return frame(columns, "part")

    def plot(self) -> Figure:
        """Exact effect and its estimate next to each other, a plotly figure."""
        objects, _ = load_plotly()
        figure = objects.Figure()
        for name, values in (("leaving it out", self.effect), ("gradient", self.estimate)):
            if not values.isnan().any():
                figure.add_trace(objects.Bar(x=list(self.labels), y=values.tolist(), name=name))
        figure.update_xaxes(title_text="layer" if all(map(str.isdigit, self.labels)) else "loop", type="category")
        figure.update_yaxes(title_text="effect (units of the metric)")
        title = f"total {self.total:+.3g}"
        if not self.effect.isnan().any():
            title += f", interaction {self.interaction:+.3g}, correlation {self.correlation:.2f}"
        return figure.update_layout(
            title=f"Whose control did it? {title}<br><sup>{self.metric}</sup>",
            barmode="group",
            width=900,
            height=420,
            template="simple_white",
        )

    def __repr__(self) -> str:
        return (
            f"Attribution({len(self.labels)} parts, total {self.total:+.4g}, sum {self.total - self.interaction:+.4g}, "
            f"interaction {self.interaction:+.4g}, correlation {self.correlation:.3f})"
        )


def attribute(
    model: Model,
    controller: Controller,
    metric: Metrics,
    prompts: Sequence[Text],
    *,
    by: str = "layer",
    others: str = "react",
    exact: bool = True,
    batch: int = 16,
    trust: bool = False,
    prepend_bos: bool | None = None,
) -> Attribution:
    """Which layer's control caused how much of the change in a metric: exactly by leaving one out, and by gradient.

        effect_i   = m(1, ..., 1, ..., 1) - m(1, ..., 0, ..., 1)        (w_i = 0, the others 1)
        estimate_i = d m / d w_i  at  w = (1, ..., 1)

    m is the metric of a forward pass in which loop i adds `w_i u_i`. The estimate is the first term of the effect's
    Taylor series in w_i, all parts by one backward pass through the closed loop: a later loop measures what is missing
    and reacts, in both. It equals the inner product of u_i with the metric's total gradient at the hook point of u_i;
    with the gradient at fixed later controls it would estimate another experiment, which `others="held"` does.

    The estimate is good for controls that are small at their layer, as those of feedback at all layers are. For few and
    strong ones it may be poor: check `correlation`; `effects` need no assumption.

    A loop that is left out still measures, and laws with memory still use its measurement, as if its `u` were patched
    to zero.

    Args:
        model: TransformerBridge, HookedTransformer or local nnsight model.
        controller: What to take apart.
        metric: From the logits of one prompt `[1 pos vocab]` to one number, as `logit_difference(model, " good",
            " bad")`; or a list of such, one a prompt.
        prompts: Texts, each run alone, so that no pad is involved.
        by: `"layer"`, or `"loop"` if several loops act at one layer.
        others: `"react"`, or `"held"`: every other control stays as it was in the steered pass.
        exact: Also leave one out; otherwise there is only one forward and one backward pass per prompt.
        batch: Rows of a forward pass; each leaves out another part.
        trust: As in `steer`.
        prepend_bos: As in `Pairs`.

    Raises:
        ValueError: no prompt, no loop, none that acts on a prompt's tokens, an unknown `by` or `others`, a metric that
            gives more than one number, or a controller that does not fit the model.

    Source: leaving one out and its first-order estimate are attribution patching (arXiv 2310.10348), here with
    controls for the activations that are patched.
    """
    host = host_of(model)
    for name, value, known in (("by", by, BY), ("others", others, OTHERS)):
        if value not in known:
            raise ValueError(f"{name}={value!r}; it is one of {', '.join(known)}")
    if not controller.loops:
        raise ValueError("the controller has no loops; there is nothing to attribute")
    tokens = [tokenize(prompt, host, prepend_bos)[0] for prompt in listed(prompts)]
    metrics = each_metric(metric, len(tokens))
    parts = _parts(controller, by)
    rows = [
        _one(host, controller, parts, chosen, torch.tensor([ids]), others == "held", exact, batch, trust)
        for ids, chosen in bar(list(zip(tokens, metrics, strict=True)), desc="attributing")
    ]
    effects, estimates, steered, unsteered = (torch.stack(column) for column in zip(*rows, strict=True))
    return Attribution(
        labels=tuple(parts),
        layers=tuple(controller.loops[indices[0]].act.layer for indices in parts.values()),
        effects=effects,
        estimates=estimates,
        steered=steered,
        unsteered=unsteered,
        metric=metric_name(metric),
        others=others,
    )


def listed(prompts: Sequence[Text]) -> list[Text]:
    """The prompts as a list.

    Raises:
        ValueError: there is none, or one text was given instead of a list.
    """
    if isinstance(prompts, str) or not len(prompts):
        raise ValueError(f"prompts={prompts!r}; give a list with at least one text")
    return list(prompts)


def _parts(controller: Controller, by: str) -> dict[str, list[int]]:
    """Indices of the loops of each part, by its label, in the order of the forward pass."""
    order = sorted(range(len(controller.loops)), key=lambda index: controller.loops[index].act)
    parts: dict[str, list[int]] = {}
    for index in order:
        loop = controller.loops[index]
        label = str(loop.act.layer) if by == "layer" else f"{index}: {loop.name}, {loop.act}"
        parts.setdefault(label, []).append(index)
    return parts


def _one(
    host: Host,
    controller: Controller,
    parts: dict[str, list[int]],
    metric: Metric,
    ids: Tensor,
    held: bool,
    exact: bool,
    batch: int,
    trust: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Effects and estimates `[part]` of one prompt, and its metric steered and unsteered."""
    part_of = {index: number for number, indices in enumerate(parts.values()) for index in indices}
    with torch.inference_mode(False):
        if held:
            with torch.no_grad():
                _, recorded = run(host, controller, ids, record=("u",), trust=trust)
            loops = [given(own["u"], loop.act) for own, loop in zip(recorded, controller.loops, strict=True)]
            controller = Controller(loops, controller.recipe)

        def value(weights: Tensor) -> Tensor:
            """The metric for each row of factors `[row part]`."""
            loops = [
                loop.replace(law=Weighted(loop.law, weights[:, part_of[index]]))
                for index, loop in enumerate(controller.loops)
            ]
            weighted = Controller(loops, controller.recipe)
            return measure(metric, run(host, weighted, ids.expand(len(weights), -1), trust=trust)[0])

        with torch.enable_grad():
            ones = torch.ones(1, len(parts), requires_grad=True)
            steered = value(ones)
            (estimate,) = torch.autograd.grad(steered.sum(), ones, allow_unused=True)
        if estimate is None:
            where = sorted({str(loop.where) for loop in controller.loops})
            raise ValueError(
                f"no loop acts on a token of the prompt (where: {', '.join(where)}); pass controller.at('last')"
            )
        left_out = 1 - torch.eye(len(parts))
        conditions = torch.cat([torch.ones(1, len(parts)), torch.zeros(1, len(parts)), *([left_out] if exact else [])])
        with torch.no_grad():
            values = torch.cat([value(rows) for rows in conditions.split(batch)]).double().cpu()
    effects = values[0] - values[2:] if exact else torch.full((len(parts),), torch.nan, dtype=torch.float64)
    return effects, estimate[0].double().cpu(), values[0], values[1]
