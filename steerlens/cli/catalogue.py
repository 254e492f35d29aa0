"""The tables of methods in README and docs, from docstrings, declarations and the benchmark's last run."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path

from steerlens import methods
from steerlens.cli.writing import write_text
from steerlens.core.sites import POINTS
from steerlens.core.types import Json
from steerlens.fit.card import DERIVATIVES, NEEDS, VECTORS
from steerlens.fit.method import Method, exported

#: What stands before and after a table in a file, and which table it is.
SHORT, LONG, END = "<!-- methods in short -->", "<!-- methods -->", "<!-- end of methods -->"
#: Fits that differentiate, beside the weights.
TRUSTED = "fit if trusted, steer"
#: What `benchmarks/methods.py` measured, in `steerlens/data`.
MEASURED = "overhead.json"


def measured() -> Json:
    """The benchmark's last run: `machine`, `date`, `unsteered` and, per method, seconds to fit and cost of decoding."""
    return json.loads((resources.files("steerlens") / "data" / MEASURED).read_text(encoding="utf-8"))


def method_table() -> str:
    """The table as Markdown, one row a method, and the conditions of the measurement under it."""
    run = measured()
    header = ("method", "what it does", "data", "acts on", "derivatives", "remote", "passes", "cost", "source")
    lines = [header, ["---"] * len(header)]
    for name, method in exported(methods).items():
        lines.append(_row(method, run["methods"].get(name)))
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        f"{table}\n\n"
        "Derivatives: what fitting differentiates. Remote: a fit runs on a server (`sl.remote`), on one that trusts "
        "you where it differentiates. Passes: forward "
        "passes at each generated token, and at a prompt where that differs. Cost: of decoding with the defaults and "
        "nothing recorded against unsteered decoding, the median over the rounds of one run and half the distance of "
        f"its quartiles, and seconds of CPU time to fit {run['pairs']} pairs; `python benchmarks/methods.py`, "
        f"{run['model']}, {run['machine']}, {run['date']}"
        f"{'; ' + run['note'] if 'note' in run else ''}."
    )


def short_table() -> str:
    """One row a method, whose name links to its paper. Two columns fit on a phone."""
    rows = []
    for method in exported(methods).values():
        number = re.search(r"arXiv (\d{4}\.\d{5})", method.source)
        name = f"[`{method.name}`](https://arxiv.org/abs/{number[1]})" if number else f"`{method.name}`"
        rows.append(f"| {name} | {_what(method)} |")
    return "\n".join(["| method | what it does |", "| --- | --- |", *rows])


def write_table(path: Path) -> None:
    """Put the tables between their markers in a file.

    Raises:
        ValueError: the file has no markers.
    """
    text = path.read_text(encoding="utf-8")
    found = [(start, table) for start, table in ((SHORT, short_table), (LONG, method_table)) if start in text]
    if not found or END not in text:
        raise ValueError(f"{path} lacks the markers {SHORT} or {LONG}, and {END}")
    for start, table in found:
        before, rest = text.split(start, 1)
        text = f"{before}{start}\n{table()}\n{END}{rest.split(END, 1)[1]}"
    write_text(path, text)


def _what(method: Method) -> str:
    return method.summary[0].lower() + method.summary[1:].rstrip(".")


def _row(method: Method, cost: Json | None) -> list[str]:
    card = method.card
    steers = "check_runs_on_a_server" not in method.exceptions
    fits = {"none": "fit, steer", "activations": TRUSTED, "blocks": TRUSTED}.get(card.derivatives, "steer")
    number = re.search(r"arXiv \d{4}\.\d{5}", method.source)
    passes = str(card.token_passes)
    if card.prompt_passes != card.token_passes:
        passes += f" (prompt {card.prompt_passes})"
    return [
        f"`{method.name}`",
        _what(method),
        NEEDS[card.needs] + (f", {card.also}" if card.also else ""),
        _points(card.points),
        DERIVATIVES[card.derivatives],
        fits if steers else "no",
        passes,
        "-" if cost is None else _cost(cost),
        number[0] if number else method.source.split(".")[0],
    ]


def _cost(cost: Json) -> str:
    low, high = cost["quartiles_percent"]
    return f"{cost['overhead_percent']:+.0f} ± {(high - low) / 2:.0f} %, {cost['fit_s']:.1f} s"


def _points(points: tuple[str, ...]) -> str:
    if set(points) == set(POINTS):
        return "any point"
    if set(points) == set(VECTORS):
        return "any point but `z`"
    return ", ".join(f"`{point}`" for point in points)
