"""Pictures of a run: plotly figures with labelled axes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steerlens.core import Record
from steerlens.core.tables import by_place
from steerlens.core.types import Figure

_PANELS = (
    ("error", "distance to the setpoint", "activation units"),
    ("u_norm", "norm of the control", "activation units"),
)


def plot_record(record: Record, *, row: int = 0, tokens: list[str] | None = None) -> Figure:
    """Tracking error and control norm by layer and token, as heat maps on a logarithmic colour scale.

    Args:
        record: Of a run that recorded scalars.
        row: Which row of the batch.
        tokens: Labels of the columns; default their positions.

    Raises:
        ImportError: plotly is not installed.
        ValueError: neither signal was recorded.
    """
    objects, make_subplots = load_plotly()
    held = [panel for panel in _PANELS if by_place(record, panel[0])]
    if not held:
        raise ValueError("nothing to plot: the run recorded neither 'error' nor 'u_norm'; use record='scalars'")
    figure = make_subplots(
        rows=len(held), cols=1, shared_xaxes=True, vertical_spacing=0.12, subplot_titles=[title for _, title, _ in held]
    )
    for number, (signal, _, unit) in enumerate(held, start=1):
        places = by_place(record, signal)
        values = torch.stack([record[full][row].float().cpu() for full in places.values()])
        heat, ticks = _log(values)
        figure.add_trace(
            objects.Heatmap(
                z=heat.tolist(),
                x=_columns(values.shape[1], tokens),
                y=_places(list(places)),
                customdata=values.tolist(),
                hovertemplate="layer %{y}, token %{x}: %{customdata:.3g}<extra></extra>",
                colorscale="Viridis",
                colorbar={
                    "title": unit,
                    "len": 0.9 / len(held),
                    "y": 1 - (number - 0.5) / len(held),
                    "tickvals": [_log10(tick) for tick in ticks],
                    "ticktext": [f"{tick:g}" for tick in ticks],
                },
            ),
            row=number,
            col=1,
        )
        figure.update_yaxes(title_text="layer", row=number, col=1)
    figure.update_xaxes(title_text="token" if tokens else "token position", row=len(held), col=1)
    return figure.update_layout(
        height=320 * len(held) + 80, width=900, template="simple_white", margin={"t": 40, "l": 60, "r": 20}
    )


def _places(places: list[tuple[int, str]]) -> list[Any]:
    """Layers as numbers; with the point where a layer has several."""
    crowded = any(point for _, point in places)
    return [f"{layer} {point}".strip() for layer, point in places] if crowded else [layer for layer, _ in places]


def _columns(count: int, tokens: list[str] | None) -> list[Any]:
    if tokens is None:
        return list(range(count))
    return [f"{position} {token!r}" for position, token in enumerate(tokens[:count])]


def _log(values: Tensor) -> tuple[Tensor, list[float]]:
    """log10 of the values (NaN and zero stay blank), and round numbers in their range for the colour bar."""
    logs = torch.where(values > 0, values, torch.nan).log10()
    finite = logs[torch.isfinite(logs)]
    low, high = (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 0.0)
    exponents = range(int(low // 1), int(high // 1) + 2)
    ticks = [base * 10.0**exponent for exponent in exponents for base in (1, 2, 5)]
    inside = [tick for tick in ticks if low <= _log10(tick) <= high]
    return logs, inside or [10.0**low]


def _log10(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).log10())


def load_plotly() -> tuple[Any, Any]:
    """`plotly.graph_objects` and `make_subplots`, imported when they are needed.

    Raises:
        ImportError: plotly is not installed.
    """
    try:
        import plotly.graph_objects as objects
        from plotly.subplots import make_subplots
    except ImportError as error:
        raise ImportError("plotting needs plotly; pip install 'steerlens[plots]'") from error
    return objects, make_subplots
