"""A PNG beside every interactive figure: GitHub, nbviewer and most editors show nothing else."""

from __future__ import annotations

import base64
from threading import Lock

import nbformat

PLOTLY = "application/vnd.plotly.v1+json"
#: One browser draws at a time.
DRAWING = Lock()


def add_pictures(notebook: nbformat.NotebookNode) -> None:
    """Draws each figure that has no picture yet.

    Raises:
        RuntimeError, ImportError: kaleido, or the browser that it needs, is not installed.
    """
    import plotly.graph_objects as go

    for output in figures(notebook):
        if "image/png" not in output.data:
            figure = go.Figure({name: output.data[PLOTLY][name] for name in ("data", "layout")}, skip_invalid=True)
            with DRAWING:
                output.data["image/png"] = base64.b64encode(figure.to_image("png")).decode()


def figures(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The outputs that are plotly figures."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output for output in outputs if PLOTLY in output.get("data", {})]
