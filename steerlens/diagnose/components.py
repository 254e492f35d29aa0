"""A result about parts of a model: one number per part, its check, a table and a figure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from steerlens.core.types import Figure, Frame
from steerlens.diagnose.result import frame
from steerlens.plots import load_plotly

#: Kind of a component -> what stands between layer and number in its label.
LETTERS = {"head": "H", "neuron": "N", "feature": "F", "attn": " attn", "mlp": " mlp", "control": " control"}


@dataclass(frozen=True)
class Components:
    """Parts of a model and what each did to a metric, in the metric's unit.

    Attributes:
        kinds: `"head"`, `"neuron"`, `"feature"`, `"attn"`, `"mlp"` or `"control"`, of each part.
        layers, units: Its layer, and its number there (0 if a layer has only one).
        values: `[prompt part]`.
        rest: What is left of `whole`, `[prompt]`: `whole - values.sum(1)`.
        whole: What the parts share: the direct effect for `direct`, `<gradient, change>` of all sites for `carriers`.
        total: What steering changed, `m(steered) - m(unsteered)`, `[prompt]`.
        exact: For parts that were checked, the metric's change when the part is patched, mean over the prompts; else
            NaN.
        metric: Name of the metric.
        title: What the values are.
    """

    kinds: tuple[str, ...]
    layers: tuple[int, ...]
    units: tuple[int, ...]
    values: Tensor
    rest: Tensor
    whole: Tensor
    total: Tensor
    exact: Tensor
    metric: str
    title: str

    @property
    def value(self) -> Tensor:
        """Mean over the prompts, `[part]`."""
        return self.values.mean(0)

    @property
    def labels(self) -> list[str]:
        """`L12H3` is head 3 of layer 12."""
        rows = zip(self.kinds, self.layers, self.units, strict=True)
        return [
            f"L{layer}{LETTERS[kind]}" + (str(unit) if len(LETTERS[kind]) == 1 else "") for kind, layer, unit in rows
        ]

    @property
    def correlation(self) -> float:
        """Pearson correlation of the estimates with what patching showed, over the parts that were checked."""
        checked = ~self.exact.isnan()
        pairs = torch.stack([self.value[checked], self.exact[checked]])
        return float(torch.corrcoef(pairs)[0, 1]) if pairs.shape[1] > 1 else float("nan")

    def top(self, count: int = 10) -> list[int]:
        """Indices of the parts with the largest values, either sign, largest first."""
        return self.value.abs().argsort(descending=True, stable=True)[:count].tolist()

    def table(self, count: int = 10) -> Frame:
        """The largest parts, one row each, a pandas DataFrame."""
        chosen = self.top(count)
        columns: dict[str, Any] = {"part": [self.labels[index] for index in chosen], "value": self.value[chosen]}
        if not self.exact.isnan().all():
            columns["patched"] = self.exact[chosen]
        return frame(columns, "part")

    def plot(self, count: int = 20) -> Figure:
        """Heads: a map of layer by head. One part a layer and kind: bars by layer. Else bars of the largest parts."""
        objects, _ = load_plotly()
        figure = objects.Figure()
        title = f"{self.title}<br><sup>{self.metric}</sup>"
        if set(self.kinds) == {"head"}:
            rows, heads = sorted(set(self.layers)), max(self.units) + 1
            grid = rearrange(self.value, "(layer head) -> layer head", head=heads)
            limit = float(grid.abs().max()) or 1.0
            scale = {
                "colorscale": "RdBu",
                "zmin": -limit,
                "zmax": limit,
                "colorbar": {"title": {"text": "effect (units of the metric)", "side": "right"}},
            }
            figure.add_trace(objects.Heatmap(z=grid.tolist(), x=list(range(heads)), y=rows, **scale))
            figure.update_xaxes(title_text="head", dtick=1)
            figure.update_yaxes(title_text="layer")
            return figure.update_layout(title=title, width=640, height=640, template="simple_white")
        if set(self.kinds) <= {"attn", "mlp", "control"}:
            for kind in dict.fromkeys(self.kinds):
                chosen = [index for index, other in enumerate(self.kinds) if other == kind]
                xs = [self.layers[index] for index in chosen]
                figure.add_trace(objects.Bar(x=xs, y=self.value[chosen].tolist(), name=kind))
            figure.update_xaxes(title_text="layer")
        else:
            chosen = self.top(count)
            names = [self.labels[index] for index in chosen]
            figure.add_trace(objects.Bar(x=names, y=self.value[chosen].tolist(), name="estimate"))
            if not self.exact.isnan().all():
                figure.add_trace(objects.Bar(x=names, y=self.exact[chosen].tolist(), name="patched"))
            figure.update_xaxes(title_text=f"{self.kinds[0]}s with the largest effect")
        figure.update_yaxes(title_text="effect (units of the metric)")
        return figure.update_layout(title=title, barmode="group", width=900, height=420, template="simple_white")

    def __repr__(self) -> str:
        best = ", ".join(f"{self.labels[index]} {float(self.value[index]):+.3g}" for index in self.top(3))
        return (
            f"Components({len(self.kinds)} parts of {float(self.whole.mean()):+.4g}, "
            f"rest {float(self.rest.mean()):+.2g}; largest {best})"
        )
