"""Controllers and records as a notebook shows them."""

from __future__ import annotations

import json
import re
from typing import Any

import torch

from steerlens.core import Controller, Loop, Record
from steerlens.core.tables import by_place, parts_of
from steerlens.pages.markup import Markup, bars, details, fragment, table, text


def controller_html(controller: Controller) -> str:
    """Its loops, what it was fitted on, and its arguments."""
    return fragment(controller_pieces(controller))


def controller_pieces(controller: Controller) -> str:
    """The same without the style, as a part of something larger."""
    groups: list[tuple[list[str], list[Loop]]] = []
    for loop in controller.loops:
        row = _row(loop)
        if groups and groups[-1][0] == row:
            groups[-1][1].append(loop)
        else:
            groups.append((row, [loop]))
    names = ("layer", "point", "law", "where", "strength", "gates")
    rows = [[_layers([loop.act.layer for loop in loops]), *row] for row, loops in groups]
    recipe = controller.recipe
    size = f"{controller.nbytes} B" if controller.nbytes < 1000 else f"{controller.nbytes / 1e3:.0f} kB"
    count = f"{len(controller)} loop{'s' * (len(controller) != 1)}"
    head = f"<p><b>Controller</b> {text(recipe.get('method', 'without a recipe'))} &middot; {count} &middot; {size}</p>"
    return head + _fitted(recipe) + table(names, rows) + _recipe(recipe)


def record_html(record: Record) -> str:
    """Each signal's mean by layer, over the tokens that were steered."""
    return fragment(record_pieces(record))


def record_pieces(record: Record) -> str:
    """The same without the style."""
    first = next(iter(record), None)
    if first is None:
        return "<p><b>Record</b> &middot; empty: nothing has run, or nothing was to be recorded</p>"
    count, tokens = record[first].shape[:2]
    scalars = dict.fromkeys(parts_of(name)[1] for name in record if record[name].ndim == 2)
    others = dict.fromkeys(parts_of(name)[1] for name in record if record[name].ndim > 2)
    rows = []
    for signal in scalars:
        places = by_place(record, signal)
        values = {place: record[full].double() for place, full in places.items()}
        # a control is 0 where nothing was steered, other signals are NaN there
        steered = {
            place: value[value.isfinite() & (value != 0) if signal.endswith("u_norm") else value.isfinite()]
            for place, value in values.items()
        }
        means = [float(own.mean()) if own.numel() else float("nan") for own in steered.values()]
        together = torch.cat([own.flatten().cpu() for own in steered.values()])
        some = [float(f(together)) if together.numel() else float("nan") for f in (torch.mean, torch.min, torch.max)]
        labels = [f"layer {layer} {point}".strip() for layer, point in places]
        rows.append([signal, _layers([layer for layer, _ in places]), bars(means, labels), *some])
    head = f"<p><b>Record</b> &middot; {count} row{'s' * (count != 1)}, {tokens} tokens</p>"
    note = f"<p class=sl-dim>with more numbers per token: {text(', '.join(others))}</p>" if others else ""
    return head + table(("signal", "layers", "mean by layer", "mean", "least", "most"), rows) + note


def target_html(target: Any) -> str:
    """Features of an autoencoder, and where they are held."""
    rows = [
        [int(index), float(low), Markup("no bound") if high == float("inf") else float(high)]
        for index, low, high in zip(target.indices, target.at_least, target.at_most, strict=True)
    ]
    head = f"<p><b>Feature{'s' * (len(rows) != 1)}</b> of a sparse autoencoder at {text(target.site)}</p>"
    note = "<p class=sl-dim>in activation units of the autoencoder</p>"
    return fragment(head, table(("feature", "at least", "at most"), rows), note)


def calibration_html(found: Any) -> str:
    """The strength that meets a budget, what was tried, and the controller at that strength."""
    low, high = found.interval
    between = f", {low:.3g} to {high:.3g}" if low == low else ""
    chosen = f"{text(found.argument)} {found.strength:.3g}{between}"
    head = f"<p><b>Calibration</b> &middot; {chosen} &middot; {text(found.budget)}</p>"
    words = f"{found.met}, with {found.value:.3g}" + (f"; {found.note}" if found.note else "")
    tried = table((found.argument, found.budget.partition(" <=")[0]), [list(map(float, row)) for row in found.curve])
    curve = details(f"{len(found.curve)} evaluations", tried)
    return fragment(head, f"<p>{text(words)}</p>", curve, controller_pieces(found.controller))


def _row(loop: Loop) -> list[Any]:
    law = type(loop.law).__name__
    setpoint = getattr(loop.law, "setpoint", None)
    if setpoint is not None:
        law += f" to {type(setpoint).__name__}"
    there = "" if loop.sense.layer == loop.act.layer else f" of layer {loop.sense.layer}"
    sensed = "" if loop.sense == loop.act else f", senses {loop.sense.point}{there}"
    where = f"mask {list(loop.where.shape)}" if isinstance(loop.where, torch.Tensor) else _where(loop.where)
    gates = ", ".join(type(gate.condition).__name__ for gate in loop.gates)
    return [loop.act.point, law + sensed, where, float(loop.strength), gates]


def _where(where: Any) -> str:
    if isinstance(where, slice):
        return f"{'' if where.start is None else where.start}:{'' if where.stop is None else where.stop}"
    return str(getattr(where, "__name__", where))


def _layers(layers: list[int]) -> str:
    """`0-3, 7`; a layer that occurs twice counts once."""
    parts: list[list[int]] = []
    for layer in sorted(set(layers)):
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def _fitted(recipe: dict[str, Any]) -> str:
    model = recipe.get("model") or {}
    if not model:
        return ""
    # a model from a folder has its path for a name
    name = re.split(r"[\\/]", model.get("name") or "")[-1] or "a model"
    words = f"fitted on {name} ({model.get('n_layers')} layers, d = {model.get('d_model')})"
    data = recipe.get("data")
    words += f", data {data if isinstance(data, str) else 'of several sets'}" if data else ""
    return f"<p class=sl-dim>{text(words)}, steerlens {text(recipe.get('steerlens', '?'))}</p>"


def _recipe(recipe: dict[str, Any]) -> str:
    kept = {name: value for name, value in recipe.items() if name in ("arguments", "found", "parts") and value}
    return details("recipe", f"<pre>{text(json.dumps(kept, indent=1, default=str))}</pre>") if kept else ""
