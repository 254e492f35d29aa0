"""The demo: A-LQR and CAA on a real model at one budget, beside its unsteered text, and how often each met the aim."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from steerlens.cli.writing import check_writable, write_text
from steerlens.control.linearization import linearize
from steerlens.core import Controller, Record
from steerlens.evaluate import Generation, calibrate, generate_texts, kl
from steerlens.fit.contrast import Pairs
from steerlens.fit.shipped import shipped, shipped_texts
from steerlens.hosts import host_of
from steerlens.laws.relative import Relative
from steerlens.methods import caa, lqr
from steerlens.models import smollm2
from steerlens.plots import plot_record
from steerlens.steering import steer

#: Words by which a text is counted as about a concept; crude, but everybody can check it.
WORDS = {
    "anger": r"ang(er|ry)|furious|rage|fury|mad\b|shout|scream|yell|hate|outrag|temper|annoy|slam",
    "french": r"\b(le|la|les|un|une|des|et|est|dans|je|il|elle|que|pour)\b",
    "ocean": r"\bsea|ocean|wave|ship|sail|boat|coast|beach|shore|fish|coral|tide|island|whale|water|marine|harbo",
    "sentiment": r"wonderful|delight|love|great|happy|beautiful|amazing|enjoy|excellent|perfect|joy|good|smil|warm",
    "wedding": r"wedding|bride|groom|marri|bouquet|vow|church|ceremony|guest|veil|honeymoon",
}
#: Nats per token that each controller may move the model, on other prompts than those shown.
BUDGET = 0.5
PROMPTS, SHOWN = 20, 3


def run_demo(
    console: Any, *, concept: str = "ocean", tokens: int = 20, picture: Path = Path("steerlens-demo.html")
) -> dict[str, Any]:
    """Fit, calibrate, count, tabulate and plot.

    Args:
        console: A rich console.
        concept: Name of the shipped contrast pairs.
        tokens: Tokens to generate for each prompt.
        picture: Where the figure is written; a PNG beside it if plotly can make one.

    Returns:
        Calibrations, texts, counts and files, as plain JSON.

    Raises:
        ValueError: a concept without a list of words to count.
    """
    from rich.table import Table

    if concept not in WORDS:
        raise ValueError(f"the demo counts words about {', '.join(WORDS)}; {concept!r} is none of them")
    check_writable(picture)
    console.print("Loading SmolLM2-135M-Instruct (converted on the first run, about half a minute).")
    model = smollm2()
    data = shipped(concept, split="dev")
    # a text's last token is often a full stop; the mean over its tokens is about the text
    pairs = Pairs(data.positive, data.negative, read="mean")
    console.print(f"Fitting CAA (one layer) and A-LQR (every layer) on {len(pairs)} contrast pairs about {concept!r}.")
    plant = linearize(model, [_whole(text) for text in pairs.positive[:4]])
    layers = range(1, model.cfg.n_layers)
    regulator = lqr(model, pairs, layers=layers, linearization=plant, progress=False)
    controllers = {"CAA": caa(model, pairs), "A-LQR": regulator}
    prompts = shipped_texts("prompts", split="held_out")[:PROMPTS]
    others = shipped_texts("prompts", split="dev")[:8]
    console.print(
        f"Calibrating both to a KL of {BUDGET} nats per token from the unsteered model, on {len(others)} prompts."
    )
    calibrations: dict[str, Any] = {}
    written: dict[str, list[Generation]] = {"unsteered": generate_texts(model, None, prompts, max_new_tokens=tokens)}
    for name, controller in controllers.items():
        found = calibrate(model, controller, others, budget=kl(tokens=16) <= BUDGET, progress=False)
        console.print(f"  {name}: {found}")
        calibrations[name] = found.plain()
        controllers[name] = found.controller
        written[name] = generate_texts(model, found.controller, prompts, max_new_tokens=tokens)
    counts = {name: sum(about(concept, text.text) for text in texts) for name, texts in written.items()}
    shown = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))[:SHOWN]
    title = f"Aim: texts about {concept!r}. Greedy continuations, and how many of {len(prompts)} use a word about it"
    table = Table("", *(f"{prompts[index]} ..." for index in shown), "count", title=title, show_lines=True)
    for name, texts in written.items():
        cells = (" ".join(texts[index].text.split()) for index in shown)
        table.add_row(name, *cells, f"{counts[name]} of {len(prompts)}")
    console.print(table)
    record, words = _recorded(model, controllers["A-LQR"], written["A-LQR"][shown[-1]])
    console.print(_layers(Table, controllers["A-LQR"], record))
    drawn = write_figure(plot_record(record, tokens=words), picture)
    for path in drawn:
        console.print(f"A-LQR's tracking error and control norm by layer and token: {path}")
    return {
        "concept": concept,
        "calibrations": calibrations,
        "counts": counts,
        "prompts": prompts,
        "texts": {name: [text.text for text in texts] for name, texts in written.items()},
        "files": [str(path) for path in drawn],
    }


def about(concept: str, text: str) -> bool:
    """Whether a text uses one of the words of a concept."""
    return bool(re.search(WORDS[concept], text, re.IGNORECASE))


def _whole(text: Any) -> str:
    return "".join(text) if isinstance(text, tuple) else text


def _recorded(model: Any, controller: Controller, text: Generation) -> tuple[Record, list[str]]:
    """What the controller did while it wrote a text, and the text's tokens."""
    host = host_of(model)
    row = [*text.prompt, *text.completion]
    with torch.no_grad(), steer(model, controller) as run, run.scoring(len(text.prompt)):
        host.logits(torch.tensor([row]))
        return run.record.copy(), [host.tokenizer.decode([token]) for token in row]


def write_figure(figure: Any, path: Path) -> Sequence[Path]:
    """Write an HTML page, and a PNG where plotly finds a browser to draw it with; returns what was written."""
    write_text(path, figure.to_html(include_plotlyjs=True))
    image = path.with_suffix(".png")
    try:
        figure.write_image(image, scale=2)
    except Exception:  # kaleido raises types of its own where no Chrome is installed
        return (path,)
    return path, image


def _layers(table: Any, controller: Controller, record: Record) -> Any:
    """Means over the steered tokens of one generation."""
    rows = table(
        "layer",
        "setpoint",
        "measured",
        "error",
        "|u|",
        title="A-LQR per layer, means over the tokens of the last prompt",
    )
    signals = {name: record.layers(name) for name in ("projection", "error", "u_norm")}
    for loop in controller.loops:
        layer = loop.act.layer
        steered = ~record.layers("error")[layer][0].isnan()
        means = [float(signals[name][layer][0][steered].mean()) for name in signals]
        # a level that is counted from the token's own unsteered state has a setpoint for each token
        law: Any = loop.law.law if isinstance(loop.law, Relative) else loop.law
        setpoint = float(torch.as_tensor(law.setpoint.level))
        if isinstance(loop.law, Relative):
            setpoint += float(record["reference", layer][0][steered].mean())
        rows.add_row(str(layer), *(f"{value:.2f}" for value in (setpoint, *means)))
    return rows
