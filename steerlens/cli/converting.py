"""`steerlens convert IN OUT`: a controller from and for other programs."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from steerlens.cli.formats import READ, WRITTEN, read_controller, write_controller
from steerlens.cli.loading import HOST, Library, optional_model
from steerlens.cli.mistakes import quiet_output
from steerlens.cli.writing import check_writable
from steerlens.sharing.plain import EVERY_TOKEN


def convert_command(
    source: Path = typer.Argument(..., metavar="IN", help="The file to read."),  # noqa: B008
    out: Path = typer.Argument(..., metavar="OUT", help="The file to write; an older one is replaced."),  # noqa: B008
    form: str = typer.Option(None, "--from", help=f"Format of IN: {', '.join(READ)}. Default: by its ending."),
    to: str = typer.Option(None, "--to", help=f"Format of OUT: {', '.join(WRITTEN)}. Default: by its ending."),
    layers: str = typer.Option(None, help="Layers to use: 15, or 3,9, or 5-10. Default: all."),
    strength: float = typer.Option(1.0, help="Factor on every control."),
    every_token: bool = typer.Option(
        False, "--every-token", help="Steer every token, the first one too, as llama.cpp and lm-eval do."
    ),
    model: str = typer.Option(None, help="Model, for lm-eval's names of modules inside a block."),
    host: Library = HOST,
    as_json: bool = typer.Option(False, "--json", help="Print the answer as JSON."),
) -> None:
    """Convert a controller from or for llama.cpp, repeng, lm-eval and others."""
    check_writable(out)
    with quiet_output():
        loaded = optional_model(model, host)
        kind, controller = read_controller(source, form=form, layers=layers, model=loaded)
        controller = controller if strength == 1.0 else controller * strength
        controller = controller.at(EVERY_TOKEN) if every_token else controller
        written = write_controller(controller, out, form=to, model=loaded)
    if as_json:
        found = {"from": kind, "to": written, "out": str(out), "controller": repr(controller)}
        typer.echo(json.dumps(found))
    else:
        typer.echo(f"{out}: {written}, from {kind}: {controller!r}")
