"""`steerlens inspect FILE`: what a file holds, where it acts, where it comes from, and whether it fits a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from steerlens.cli.formats import read_controller
from steerlens.cli.loading import HOST, NAMES, Library, optional_model
from steerlens.cli.mistakes import FAILED, quiet_output
from steerlens.core import Controller, Loop, check_loops, tensors_of
from steerlens.hosts import host_of
from steerlens.hosts.dimensions import plain_name
from steerlens.sharing.card import norm_text, where_text

#: Loops that are printed one by one.
MOST_LOOPS = 40


def inspect_command(
    file: Path = typer.Argument(..., help="A controller, or what steerlens convert reads."),  # noqa: B008
    model: str = typer.Option(None, help=f"Also check whether it fits: {NAMES}"),
    host: Library = HOST,
    form: str = typer.Option(None, "--from", help="Format of the file, if its name does not tell it."),
    layers: str = typer.Option(None, help="Layers to use of a file that has a vector for every layer: 15, or 3,9."),
    as_json: bool = typer.Option(False, "--json", help="Print the answer as JSON."),
) -> None:
    """Show what a controller file holds, where it acts and where it comes from; exit code 1 if it does not fit."""
    with quiet_output():
        loaded = optional_model(model, host)
        kind, controller = read_controller(file, form=form, layers=layers, model=loaded)
        found = described(file, kind, controller)
        if loaded is not None:
            faults = misfits(loaded, controller)
            found["fits"] = {"model": model, "ok": not faults, "faults": faults}
    typer.echo(json.dumps(found) if as_json else "\n".join(_page(found)))
    if found.get("fits") and not found["fits"]["ok"]:
        raise typer.Exit(FAILED)


def described(file: Path, kind: str, controller: Controller) -> dict[str, Any]:
    """All that `steerlens inspect` prints, as plain JSON."""
    return {
        "file": str(file),
        "format": kind,
        "bytes": file.stat().st_size,
        "controller": repr(controller),
        "loops": [_loop(loop) for loop in controller],
        "recipe": controller.recipe,
    }


def misfits(model: Any, controller: Controller) -> list[str]:
    """Why a controller cannot be attached to a model, in sentences; empty if it can."""
    host, found = host_of(model), []
    try:
        host.check({site for loop in controller for site in (loop.act, loop.sense)})
        check_loops(controller.loops, host.shape, host.dtype)
    except ValueError as error:
        found.append(str(error))
    for method, fitted in controller.fingerprints:
        differences = host.differences(fitted)
        if differences:
            found.append(f"this {method} was fitted on another model: {'; '.join(differences)}")
    return found


def _loop(loop: Loop) -> dict[str, Any]:
    sizes = {tuple(tensor.shape) for tensor in tensors_of(loop.parts)}
    vector = norm_text(loop)
    return {
        "name": loop.name,
        "acts at": str(loop.act),
        "senses": str(loop.sense),
        "law": type(loop.law).__name__,
        "tokens": where_text(loop),
        "strength": loop.strength,
        "norm": None if vector == "-" else float(vector),
        "shapes": sorted(map(list, sizes)),
    }


def _page(found: dict[str, Any]) -> list[str]:
    lines = [f"{found['file']}: {found['controller']}", f"format    {found['format']}, {found['bytes']} bytes"]
    for words in _provenance(found["recipe"]):
        lines.append(f"made by   {words}")
    for loop in found["loops"][:MOST_LOOPS]:
        norm = "" if loop["norm"] is None else f", norm {loop['norm']:.4g}"
        sensed = "" if loop["senses"] == loop["acts at"] else f", senses {loop['senses']}"
        lines.append(
            f"acts at   {loop['acts at']}: {loop['law']}, tokens: {loop['tokens']}, strength {loop['strength']:g}"
            f"{norm}{sensed}"
        )
    if len(found["loops"]) > MOST_LOOPS:
        lines.append(f"          and {len(found['loops']) - MOST_LOOPS} more; --json has all")
    if "fits" in found:
        fits = found["fits"]
        lines.append(f"fits      {fits['model']}: {'yes' if fits['ok'] else '; '.join(fits['faults'])}")
    return [_printable(line) for line in lines]


def _provenance(recipe: dict[str, Any]) -> list[str]:
    """One line for each summand."""
    own = []
    if recipe.get("method") != "+":
        arguments = ", ".join(f"{name}={value}" for name, value in dict(recipe.get("arguments") or {}).items())
        words = f"{recipe.get('method', 'not known')}({arguments})"
        model = recipe.get("model") or {}
        if model:
            name = plain_name(str(model.get("name") or "a model"))
            words += f" on {name} of {model.get('n_layers')} layers, d = {model.get('d_model')}"
        words += f", data {recipe['data']}" if recipe.get("data") else ""
        own = [words + (f", steerlens {recipe['steerlens']}" if recipe.get("steerlens") else "")]
    return own + [words for part in recipe.get("parts", ()) for words in _provenance(part)]


def _printable(line: str) -> str:
    """Without what steers a terminal: a recipe may hold any text, and a file may come from anybody."""
    shown = "".join(letter if letter.isprintable() else " " for letter in line)
    return shown if len(shown) <= 1000 else f"{shown[:1000]}..."
