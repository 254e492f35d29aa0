"""Draw docs/held_light.svg and docs/held_dark.svg: one feature along three generations, and print the three texts.

python tools/held_feature.py

SmolLM2 and its shipped autoencoder: unsteered; with the decoder row times the one coefficient that is best, in the
mean squared miss, over four other prompts (benchmarks/sae.py); held at a level, the 0.95 quantile of the feature's
activations in texts about the sea, where it is on. About two minutes on one core.
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import sae as benchmark  # noqa: E402

import steerlens as sl  # noqa: E402
from steerlens.models import smollm2, smollm2_sae  # noqa: E402

PROMPT, TOKENS = "The tall man behind the counter said", 30
WIDTH, ROW, LEFT, RIGHT, BARS, TOP = 680, 172, 58, 14, 78, 46
#: Ink, faint ink, ground, and the three series.
COLOURS = {
    "light": ("#1c2b33", "#5b6f79", "#ffffff", ("#78909c", "#c2570c", "#00796b")),
    "dark": ("#e6edf1", "#9fb0b9", "#161b22", ("#90a4ae", "#f0883e", "#3fb8a6")),
}
TITLES = ("unsteered", "a fixed vector, its best coefficient", "held at {level:.1f} by feedback")


def main() -> None:
    """Measure, print, draw."""
    model, sae = smollm2(), smollm2_sae()
    sea = sl.shipped("ocean").positive
    table = sl.sae.rank_features(model, sae, sl.shipped("ocean", read="mean"))
    index = int(table[(table.score > 0) & (table.effect > 0)].index[0])
    target = sl.sae.feature(sae, index, quantile=0.95, model=model, texts=sea)
    held = sl.sae.hold(model, target)
    coefficient = benchmark.best_coefficient(model, target)
    arms = (held * 0, benchmark.fixed(model, target, coefficient), held)
    series = [measure(model, controller, target) for controller in arms]
    level = target.at_least[0]
    print(f"feature {index}, level {level:.2f}, coefficient {coefficient:.2f}")
    for (text, values), title in zip(series, TITLES, strict=True):
        print(f"{title.format(level=level)}: {text!r}\n  {[round(value, 1) for value in values]}")
    for name, colours in COLOURS.items():
        (ROOT / "docs" / f"held_{name}.svg").write_text(draw(series, level, *colours), encoding="utf-8")


def measure(model: object, controller: sl.Controller, target: sl.sae.Target) -> tuple[str, list[float]]:
    """The continuation and the feature at each step, after the control."""
    with sl.steer(model, controller + sl.sae.observe(model, target, where="last")) as run:
        options = {"max_new_tokens": TOKENS, "do_sample": False, "stop_at_eos": False, "verbose": False}
        text = model.generate(PROMPT, **options)
        values = run.record["observe_feature", target.site.layer][0, -TOKENS:]
    return " ".join(text.removeprefix(PROMPT).split()), values.tolist()


def draw(series: list, level: float, ink: str, faint: str, ground: str, colours: tuple[str, ...]) -> str:
    """Three rows of bars over one scale, the level dashed, the text under each."""
    most = 1.04 * max(max(values) for _, values in series)
    height = TOP + len(series) * ROW + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="system-ui,-apple-system,Segoe UI,sans-serif" role="img">',
        "<title>One feature of a sparse autoencoder along three generations</title>",
        f'<rect width="{WIDTH}" height="{height}" rx="10" fill="{ground}"/>',
        f'<text x="14" y="28" font-size="18" font-weight="600" fill="{ink}">',
        "A feature of water and the sea, at each token</text>",
    ]
    step = (WIDTH - LEFT - RIGHT) / TOKENS
    for row, ((text, values), title, colour) in enumerate(zip(series, TITLES, colours, strict=True)):
        base = TOP + row * ROW + 26 + BARS
        parts.append(
            f'<text x="14" y="{base - BARS - 10}" font-size="17" font-weight="600" fill="{colour}">'
            f"{title.format(level=level)}</text>"
        )
        for at in (0.0, level):
            y = base - BARS * at / most
            dash = ' stroke-dasharray="6 4"' if at else ""
            parts.append(
                f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{faint}"{dash}/>'
                f'<text x="{LEFT - 8}" y="{y + 5:.1f}" font-size="14" text-anchor="end" fill="{faint}">{at:.3g}</text>'
            )
        for place, value in enumerate(values):
            x, tall = LEFT + (place + 0.18) * step, BARS * value / most
            parts.append(
                f'<rect x="{x:.1f}" y="{base - tall:.1f}" width="{0.64 * step:.1f}" height="{max(tall, 1.5):.1f}" '
                f'fill="{colour}"/>'
            )
        for number, line in enumerate(wrapped(f"{PROMPT} {text}".replace(" , ", ", "))):
            parts.append(
                f'<text x="14" y="{base + 24 + 20 * number}" font-size="15" fill="{ink}">{escape(line)}</text>'
            )
    return "\n".join([*parts, "</svg>"]) + "\n"


def wrapped(text: str, width: int = 84, lines: int = 2) -> list[str]:
    """The first lines of a text."""
    rows = [""]
    for word in text.split():
        if len(rows[-1]) + len(word) >= width:
            rows.append("")
        rows[-1] = f"{rows[-1]} {word}".strip()
    return rows[:lines] if len(rows) <= lines else [*rows[: lines - 1], rows[lines - 1] + " ..."]


if __name__ == "__main__":
    main()
