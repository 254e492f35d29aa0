"""The command line: `steerlens fit`, `generate`, `compare` and others; docs/cli.md walks through them."""

from __future__ import annotations

import json
from pathlib import Path

import typer
from rich.console import Console

from steerlens.cli.converting import convert_command
from steerlens.cli.demo import run_demo
from steerlens.cli.doctor import doctor_command
from steerlens.cli.fitting import fit_command, generate_command
from steerlens.cli.inspecting import inspect_command
from steerlens.cli.lists import cite_command, methods_command, models_command
from steerlens.cli.measure import calibrate_command, compare_command, sweep_command
from steerlens.cli.mistakes import Commands

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    help="Steering of language models as feedback control.",
    epilog="Exit codes: 0, 1 it failed (one sentence gives the reason), 2 the call is wrong, 130 interrupted.",
    pretty_exceptions_enable=False,
)


@app.command()
def demo(
    concept: str = typer.Option("ocean", help="Shipped contrast pairs: anger, french, ocean, sentiment or wedding."),
    tokens: int = typer.Option(20, min=1, help="Tokens to generate for each prompt."),
    picture: Path = typer.Option(Path("steerlens-demo.html"), help="Where to write the figure."),  # noqa: B008
    as_json: bool = typer.Option(False, "--json", help="Print texts and counts as JSON."),
) -> None:
    """Steer a real model with CAA and A-LQR at one budget: texts, counts over twenty prompts, a figure."""
    found = run_demo(Console(stderr=as_json), concept=concept, tokens=tokens, picture=picture)
    if as_json:
        typer.echo(json.dumps(found))


app.command("methods")(methods_command)
app.command("models")(models_command)
app.command("fit")(fit_command)
app.command("generate")(generate_command)
app.command("compare")(compare_command)
app.command("calibrate")(calibrate_command)
app.command("sweep")(sweep_command)
app.command("inspect")(inspect_command)
app.command("convert")(convert_command)
app.command("cite")(cite_command)
app.command("doctor")(doctor_command)


if __name__ == "__main__":
    app()
