"""The demo: A-LQR on a real model, beside the unsteered text, with the tracking error of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from steerlens.control.linearization import linearize
from steerlens.core import Controller, Record
from steerlens.fit.shipped import shipped
from steerlens.methods import lqr
from steerlens.models import smollm2
from steerlens.plots import plot_record
from steerlens.steering import steer

PROMPTS = ("My weekend was", "I went to the new restaurant last night and")
LEVELS = (0.5, 1.0, 2.0)


def run_demo(
    console: Any, *, concept: str = "ocean", tokens: int = 20, picture: Path = Path("steerlens-demo.html")
) -> None:
    """Fit, compare, tabulate and plot.

    Args:
        console: A rich console.
        concept: Name of the shipped contrast pairs.
        tokens: Tokens to generate for each prompt.
        picture: Where the figure is written; a PNG beside it where plotly can make one.
    """
    from rich.table import Table

    console.print("Loading SmolLM2-135M-Instruct (converted on the first run, about half a minute).")
    model = smollm2()
    pairs = shipped(concept)
    console.print(f"Fitting A-LQR on {len(pairs)} contrast pairs about {concept!r}.")
    plant = linearize(model, pairs.positive[:4])
    # all texts end in a full stop, which is all that layer 0 sees of them
    layers = range(1, model.cfg.n_layers)
    controllers = {
        level: lqr(model, pairs, level=level, layers=layers, linearization=plant, progress=False) for level in LEVELS
    }
    texts = Table("level", *PROMPTS, title="Greedy continuations, unsteered and steered", show_lines=True)
    texts.add_row("-", *(_continue(model, prompt, tokens)[0] for prompt in PROMPTS))
    for level, controller in controllers.items():
        with steer(model, controller) as run:
            continued = [_continue(model, prompt, tokens) for prompt in PROMPTS]
            texts.add_row(f"{level:g}", *(text for text, _ in continued))
            record, words = run.record.copy(), continued[-1][1]
    console.print(texts)
    console.print(_layers(Table, controller, record, level))
    for path in write_figure(plot_record(record, tokens=words), picture):
        console.print(f"Tracking error and control norm by layer and token: {path}")


def write_figure(figure: Any, path: Path) -> Sequence[Path]:
    """Write an HTML page, and a PNG where plotly finds a browser to draw it with; returns what was written."""
    figure.write_html(path, include_plotlyjs=True)
    image = path.with_suffix(".png")
    try:
        figure.write_image(image, scale=2)
    except Exception:  # kaleido raises types of its own where no Chrome is installed
        return (path,)
    return path, image


def _continue(model: Any, prompt: str, tokens: int) -> tuple[str, list[str]]:
    """The continuation, and prompt and continuation as tokens."""
    options = {"max_new_tokens": tokens, "do_sample": False, "verbose": False, "return_type": "tokens"}
    words = model.to_str_tokens(model.generate(prompt, **options)[0])
    return "".join(words)[len(prompt) :].strip(), words


def _layers(table: Any, controller: Controller, record: Record, level: float) -> Any:
    """Means over the steered tokens of one generation."""
    rows = table(
        "layer",
        "setpoint",
        "measured",
        "error",
        "|u|",
        title=f"Per layer at level {level:g}, means",
    )
    signals = {name: record.layers(name) for name in ("projection", "error", "u_norm")}
    for loop in controller.loops:
        layer = loop.act.layer
        steered = ~record.layers("error")[layer][0].isnan()
        means = [float(signals[name][layer][0][steered].mean()) for name in signals]
        setpoint = float(torch.as_tensor(loop.law.setpoint.level))  # type: ignore[attr-defined]
        rows.add_row(str(layer), *(f"{value:.2f}" for value in (setpoint, *means)))
    return rows
