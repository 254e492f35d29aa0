"""`steerlens compare`, `calibrate` and `sweep`: the library's verbs on a task, printed as Markdown or JSON."""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from steerlens.cli.loading import HOST, MODEL, Library, load_model
from steerlens.cli.mistakes import INTERRUPTED, quiet_output
from steerlens.cli.options import read_options
from steerlens.cli.task import METHODS, fits_of, read_fit, task_of
from steerlens.cli.writing import check_controller_path, check_writable, text_between, write_text
from steerlens.evaluate import Budget, Evaluation, calibrate, compare, fluency, kl, neutral_loss, sweep
from steerlens.hosts import host_of

Echo = Callable[[str], Any]

#: Around the table in a page.
MARKERS = "<!-- steerlens compare -->", "<!-- end of compare -->"

CONCEPT = typer.Option("sentiment", help="Shipped contrast pairs.")
PAIRS = typer.Option(None, help="Own contrast pairs instead: a csv or JSON lines, as for steerlens fit.")
INSTRUCTION = typer.Option(None, help="What the prompt baseline asks for.")
BUDGET = typer.Option(0.3, min=1e-6, help="Largest KL from the unsteered model, nats per token.")
AT = typer.Option("mean", help="Of the KL: mean, or a percentile of the tokens such as p95.")
WHERE = typer.Option("last", help="Tokens to steer: last, all, generated, ..., or own: as each method does.")
COUNT = typer.Option(None, min=1, help="Items at most; prompts for texts twice as many, for the KL all.")
SEED = typer.Option(0, help="Of all sampling.")
FILE = typer.Option(
    None, help="JSON lines; a run that was stopped goes on from it. Default: named after command and task."
)
AS_JSON = typer.Option(False, "--json", help="Print numbers as JSON.")


def compare_command(
    methods: list[str] = typer.Option(list(METHODS), "--method", help="Such as caa:layers=all,strength=2."),  # noqa: B008
    model: str = MODEL,
    host: Library = HOST,
    concept: str = CONCEPT,
    pairs: Path = PAIRS,
    instruction: str = INSTRUCTION,
    budget: float = BUDGET,
    at: str = AT,
    where: str = WHERE,
    count: int = COUNT,
    seeds: int = typer.Option(10, help="Random directions."),
    seed: int = SEED,
    file: Path = FILE,
    write: Path = typer.Option(None, help="Put the table between its markers in this file."),  # noqa: B008
    as_json: bool = AS_JSON,
) -> None:
    """Methods side by side at one budget: effect on held-out items, and damage."""
    task = task_of(concept, pairs, instruction, count)
    path = file or Path(f"steerlens-compare-{task.name}.jsonl")
    for name in methods:
        read_fit(name)
    if write is not None:
        text_between(write, *MARKERS)

    def run() -> Evaluation:
        loaded = load_model(model, host)
        return compare(
            loaded,
            fits_of(methods, loaded, task.fit, where),
            task.effect,
            budget=kl(task.budgeted, at=at) <= budget,
            prompts=task.prompts,
            damage=[neutral_loss(), fluency()],
            seeds=seeds,
            seed=seed,
            file=path,
        )

    fresh, start = not path.exists(), time.process_time()
    found = _resumable(run, path)
    # a run that went on from a file says nothing about the time that all of it took
    took = f", {(time.process_time() - start) / 60:.0f} min of processor time" if fresh else ""
    options: dict[str, Any] = {"pairs": pairs} if pairs else {"concept": concept}
    options |= {"budget": budget, "where": where, "seeds": seeds, "seed": seed, "model": model}
    options |= {"host": host.value} if host is not Library.bridge else {}
    options |= {"count": count} if count else {}
    chosen = [f"--method={name}" for name in methods] if list(methods) != list(METHODS) else []
    command = "steerlens compare " + shlex.join([*chosen, *(f"--{name}={value}" for name, value in options.items())])
    page = f"{found.card()}\n- `{command}`{took}"
    if write is not None:
        write_between(write, page)
    typer.echo(json.dumps(plain(found)) if as_json else page)


def calibrate_command(
    method: str = typer.Option("caa", help="Such as caa:layers=all."),
    model: str = MODEL,
    host: Library = HOST,
    concept: str = CONCEPT,
    pairs: Path = PAIRS,
    budget: float = BUDGET,
    at: str = AT,
    where: str = WHERE,
    count: int = COUNT,
    seed: int = SEED,
    save: Path = typer.Option(None, help="Write the calibrated controller to this safetensors file."),  # noqa: B008
    as_json: bool = AS_JSON,
) -> None:
    """The strength at which a method spends a budget, with an interval."""
    task = task_of(concept, pairs, None, count)
    read_fit(method)
    if save is not None:
        check_controller_path(save)
    limit: Budget = kl(at=at) <= budget
    with quiet_output():
        loaded = load_model(model, host)
        (fit,) = fits_of([method], loaded, task.fit, where).values()
        found = calibrate(loaded, fit(), task.budgeted[::2], budget=limit, seed=seed)
    if save is not None:
        found.controller.save(save)
    typer.echo(json.dumps(found.plain()) if as_json else repr(found))


def sweep_command(
    method: str = typer.Option("caa", help="A method with the options layers and strength."),
    layers: str = typer.Option(None, help="Such as 3,9,15; default every fourth."),
    strengths: str = typer.Option("0.5,1,2", help="Factors on the control."),
    model: str = MODEL,
    host: Library = HOST,
    concept: str = CONCEPT,
    pairs: Path = PAIRS,
    budget: float = BUDGET,
    at: str = AT,
    where: str = WHERE,
    count: int = COUNT,
    seed: int = SEED,
    file: Path = FILE,
    as_json: bool = AS_JSON,
) -> None:
    """Effect and KL at every layer and strength, and the best place within a budget."""
    task = task_of(concept, pairs, None, count)
    path = file or Path(f"steerlens-sweep-{task.name}.jsonl")
    factors = [_number("strengths", value) for value in strengths.split(",")]
    grid = None if layers is None else read_options(read_fit(method)[0], [f"layers={layers}"])["layers"]

    def run() -> Evaluation:
        loaded = load_model(model, host)
        known = host_of(loaded).n_layers
        chosen = list(range(known)) if grid == "all" else [grid] if isinstance(grid, int) else grid
        (fit,) = fits_of([method], loaded, task.fit, where).values()
        held: dict[int, Any] = {}

        def make(layer: int, strength: float) -> Any:
            if layer not in held:
                held[layer] = fit(layers=layer)
            return held[layer] * strength

        make.digest = fit.digest  # type: ignore[attr-defined]
        return sweep(
            loaded,
            make,
            task.effect,
            layers=list(range(0, known, 4)) if chosen is None else chosen,
            strengths=factors,
            prompts=task.prompts[: len(task.effect.items or ())],
            damage=[kl(at=at)],
            seed=seed,
            file=path,
        )

    found = _resumable(run, path)
    try:
        best = found.choose("KL", budget)
        low, high = best.interval
        words = (
            f"best within KL {at} <= {budget:g}: {best.arm}, strength {best.strength:g}; on the other half effect "
            f"{best.effect:+.3g} [{low:+.3g} {high:+.3g}], KL {best.damage:.3g}"
        )
    except ValueError as error:
        words = str(error)
    if as_json:
        typer.echo(json.dumps(plain(found) | {"choice": words}))
    else:
        typer.echo(f"{found.card()}\n- {words}")


def plain(found: Evaluation) -> dict[str, Any]:
    """An evaluation as plain JSON; what is not a number is null."""
    rows = found.table().reset_index().to_dict("records")
    clean = [
        {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}
        for row in rows
    ]
    chosen = {name: dict(own) for name, own in found.calibrations.items()}
    for own in chosen.values():
        own["interval"] = [None if math.isnan(end) else end for end in own["interval"]]
    return {"effect": found.effect, "table": clean, "calibrations": chosen, "protocol": dict(found.protocol)}


def write_between(path: Path, page: str) -> None:
    """Put a page between the markers of `steerlens compare --write` in a file.

    Raises:
        ValueError: the file lacks a marker.
    """
    before, behind = text_between(path, *MARKERS)
    write_text(path, f"{before}\n{page}\n{behind}")


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--{name}: {text!r} is no number; write numbers with commas between, 0.5,1,2") from None


def _resumable(run: Callable[[], Evaluation], path: Path) -> Evaluation:
    check_writable(path)
    try:
        with quiet_output():
            return run()
    except KeyboardInterrupt:
        typer.echo(f"stopped; {path} holds what is known. The same command goes on from there.", err=True)
        raise typer.Exit(INTERRUPTED) from None
