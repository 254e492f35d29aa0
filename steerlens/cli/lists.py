"""`steerlens methods`, `models` and `cite`: what there is, what it works on, and whom to cite."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import typer

from steerlens import methods
from steerlens.cli.catalogue import method_table, write_table
from steerlens.cli.options import known_method
from steerlens.fit.card import NEEDS
from steerlens.fit.method import exported
from steerlens.sharing.citations import arxiv_number, bibtex

AS_JSON = typer.Option(False, "--json", help="Print the answer as JSON.")


def methods_command(
    markdown: bool = typer.Option(False, help="Print the README's table instead."),
    write: Path = typer.Option(None, help="Put the table between its markers in this file."),  # noqa: B008
    as_json: bool = AS_JSON,
) -> None:
    """List the steering methods."""
    if write is not None:
        write_table(write)
    elif markdown:
        typer.echo(method_table())
    elif as_json:
        found = [
            {
                "name": name,
                "summary": method.summary,
                "data": NEEDS[method.card.needs],
                "points": list(method.card.points),
                "source": method.source,
            }
            for name, method in exported(methods).items()
        ]
        typer.echo(json.dumps(found))
    else:
        for name, method in exported(methods).items():
            typer.echo(f"{name:12} {method.summary}\n{'':12} {method.source}")


def models_command(as_json: bool = AS_JSON) -> None:
    """Which points of which architectures work on which library, as tested."""
    page = _data("models.md")
    typer.echo(json.dumps(_table(page)) if as_json else page)


def cite_command(
    names: list[str] = typer.Argument(None, help="Methods; default all."),  # noqa: B008
    notes: bool = typer.Option(False, "--notes", help="In words instead, with what differs from the authors' code."),
    as_json: bool = AS_JSON,
) -> None:
    """Print the papers of the methods that you used as BibTeX."""
    sources = {name: known_method(name).source for name in names or exported(methods)}
    numbers = {name: arxiv_number(source) or name for name, source in sources.items()}
    # a method of one's own is not in the file of entries
    entries = {number: _plain_entry(name, sources[name]) for name, number in numbers.items()} | bibtex()
    if as_json:
        found = [
            {"method": name, "arxiv": arxiv_number(source), "bibtex": entries[numbers[name]], "notes": source}
            for name, source in sources.items()
        ]
        typer.echo(json.dumps(found))
    elif notes:
        typer.echo("\n".join(f"{name}: {source}" for name, source in sources.items()))
    else:
        for number in dict.fromkeys(numbers.values()):
            used = ", ".join(name for name in sources if numbers[name] == number)
            typer.echo(f"% {used}\n{entries[number]}\n")


def _data(name: str) -> str:
    return files("steerlens").joinpath("data", name).read_text(encoding="utf-8")


def _table(page: str) -> list[dict[str, str]]:
    """The rows of the first Markdown table of a page."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    names = [name.strip("`") for name in rows[0]]
    return [dict(zip(names, row, strict=False)) for row in rows[2:]]


def _plain_entry(name: str, source: str) -> str:
    """An entry made of a method's docstring, whose source names the authors."""
    number = arxiv_number(source)
    arxiv = f"  eprint = {{{number}}},\n  archivePrefix = {{arXiv}},\n" if number else ""
    return f"@misc{{{name},\n{arxiv}  note = {{{source}}}\n}}"
