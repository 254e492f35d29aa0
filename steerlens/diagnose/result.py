"""What every diagnosis returns: numbers first, a table of them, and a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from steerlens.core.types import Figure, Frame
from steerlens.plots import load_plotly

Curves = Mapping[str, tuple[Sequence[int], Tensor]]


def frame(columns: Mapping[str, Any], index: str) -> Frame:
    """A pandas DataFrame of equally long columns, indexed by one of them.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("tables need pandas; pip install 'steerlens[plots]'") from error
    plain = {name: value.tolist() if isinstance(value, Tensor) else list(value) for name, value in columns.items()}
    return pandas.DataFrame(plain).set_index(index)


def curves(lines: Curves, *, title: str, x: str, y: str, log: bool = False, dashed: Sequence[str] = ()) -> Figure:
    """A plotly figure of lines, one a name, with labelled axes; NaN leaves a gap.

    Raises:
        ImportError: plotly is not installed.
    """
    objects, _ = load_plotly()
    figure = objects.Figure()
    for name, (xs, ys) in lines.items():
        line = {"dash": "dash"} if name in dashed else {}
        figure.add_trace(objects.Scatter(x=list(xs), y=ys.tolist(), name=name, mode="lines+markers", line=line))
    figure.update_xaxes(title_text=x)
    figure.update_yaxes(title_text=y, type="log" if log else "linear")
    return figure.update_layout(title=title, width=900, height=420, template="simple_white")
