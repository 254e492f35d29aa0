"""The command line: `steerlens demo`, `compare`, `calibrate`, `sweep`, `methods`, `cite` and others."""

from __future__ import annotations

from pathlib import Path

import typer

from steerlens.cli.measure import calibrate_command, compare_command, sweep_command

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Steering of language models as feedback control.")


@app.command()
def demo(
    concept: str = typer.Option("ocean", help="Shipped contrast pairs: anger, french, ocean, sentiment or wedding."),
    tokens: int = typer.Option(20, help="Tokens to generate for each prompt."),
    picture: Path = typer.Option(Path("steerlens-demo.html"), help="Where to write the figure."),  # noqa: B008
) -> None:
    """Steer a real model with CAA and A-LQR at one budget: texts, counts over twenty prompts, a figure."""
    from rich.console import Console

    from steerlens.cli.demo import run_demo

    run_demo(Console(), concept=concept, tokens=tokens, picture=picture)


@app.command("methods")
def list_methods(
    markdown: bool = typer.Option(False, help="Print the README's table instead."),
    write: Path = typer.Option(None, help="Put the table between its markers in this file."),  # noqa: B008
) -> None:
    """List the steering methods."""
    from steerlens import methods
    from steerlens.cli.catalogue import method_table, write_table
    from steerlens.fit.method import exported

    if write is not None:
        write_table(write)
    elif markdown:
        typer.echo(method_table())
    else:
        for name, method in exported(methods).items():
            typer.echo(f"{name:12} {method.summary}\n{'':12} {method.source}")


@app.command()
def models() -> None:
    """Which points of which architectures work on which library, as tested."""
    from importlib.resources import files

    typer.echo(files("steerlens").joinpath("data/models.md").read_text(encoding="utf-8"))


@app.command()
def cite(names: list[str] = typer.Argument(None, help="Methods; default all.")) -> None:  # noqa: B008
    """Print the source of each method that you used."""
    from steerlens import methods
    from steerlens.fit.method import exported

    known = exported(methods)
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise typer.BadParameter(f"no method {', '.join(unknown)}; there are {', '.join(known)}")
    for name in names or known:
        typer.echo(f"{name}: {known[name].source}")


app.command("compare")(compare_command)
app.command("calibrate")(calibrate_command)
app.command("sweep")(sweep_command)


if __name__ == "__main__":
    app()
