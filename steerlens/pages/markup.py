"""Pieces of HTML: escaped text, tables, bars, coloured tokens, and a page around them."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

# Colours are the reader's own (`currentColor`) and washes that can be read on white and on black: a notebook in its
# dark theme does not always say so in `prefers-color-scheme`, which decides a saved page alone.
STYLE = """
.sl{font:14px/1.45 system-ui,sans-serif;max-width:72rem;overflow-wrap:anywhere}
.sl h3{font-size:1em;margin:.9em 0 .3em}
.sl p{margin:.3em 0}
.sl .sl-dim{opacity:.72}
.sl .sl-wide{overflow-x:auto}
.sl table{border-collapse:collapse;margin:.4em 0;font-size:13px;color:inherit;background:none}
.sl th,.sl td{padding:.2em .7em;text-align:left;white-space:nowrap;border:0;
border-bottom:1px solid rgba(127,127,127,.35);background:none;color:inherit}
.sl th{font-weight:600}
.sl td.sl-n,.sl th.sl-n{text-align:right;font-variant-numeric:tabular-nums}
.sl summary{cursor:pointer}
.sl pre{white-space:pre-wrap;font-size:12px;margin:.3em 0}
.sl svg{vertical-align:middle}
.sl-cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,19rem),1fr));gap:.7em}
.sl-card{border:1px solid rgba(127,127,127,.4);border-radius:8px;padding:.5em .8em .7em}
.sl-card b{display:block;font-size:13px;margin-bottom:.2em}
.sl-text{line-height:1.75;white-space:pre-wrap}
.sl-text i{font-style:normal;opacity:.6}
.sl-text span{border-radius:3px;padding:.12em 0}
.sl-text span[tabindex]{cursor:help}
.sl-text span[tabindex]:hover,.sl-text span[tabindex]:focus{outline:1.5px solid currentColor}
.sl-text span[tabindex]:focus::after{content:attr(title);position:fixed;left:0;right:0;bottom:0;z-index:9;
padding:.6em 1em;background:Canvas;color:CanvasText;border-top:1px solid currentColor;font-size:14px}
.sl-legend{display:flex;flex-wrap:wrap;align-items:center;gap:.2em .6em;margin:.5em 0;font-size:13px}
.sl-legend span{display:inline-block;width:9rem;height:.9em;border-radius:3px;border:1px solid rgba(127,127,127,.4)}
@media (prefers-color-scheme:dark){.sl-page{background:#15171a;color:#e6e6e6}
.sl-page .sl-text span[tabindex]:focus::after{background:#15171a;color:#e6e6e6}}
"""
#: Red, green and blue of what is above and below zero, and the alpha of the largest value: text stays readable on it.
ABOVE, BELOW, STRONGEST = (240, 128, 20), (40, 130, 235), 0.55


def text(value: Any) -> str:
    """Anything as text that HTML cannot take for markup."""
    return html.escape(str(value), quote=True)


def number(value: float) -> str:
    """A number in three digits; a dash where there is none."""
    return "-" if math.isnan(value) else f"{value:.3g}"


def table(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; numbers stand to the right, cells of `Markup` are HTML already."""
    body = [[_cell(cell) for cell in row] for row in rows]
    right = [bool(body) and 'class="sl-n"' in body[0][index] for index in range(len(names))]
    head = "".join(
        f"<th{' class=sl-n' if end else ''}>{text(name)}</th>" for name, end in zip(names, right, strict=True)
    )
    lines = "".join(f"<tr>{''.join(row)}</tr>" for row in body)
    return f'<div class="sl-wide"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def details(title: str, body: str) -> str:
    """What is folded away until it is asked for."""
    return f"<details><summary>{text(title)}</summary>{body}</details>"


def bars(values: Sequence[float], labels: Sequence[str]) -> Markup:
    """A bar for each value, from zero, as a picture of 1.4 em."""
    finite = [abs(value) for value in values if math.isfinite(value)]
    most = max(finite, default=0.0) or 1.0
    width = max(2, min(10, 160 // max(len(values), 1)))
    drawn = []
    for index, (value, label) in enumerate(zip(values, labels, strict=True)):
        height = 20 * abs(value) / most if math.isfinite(value) else 0.0
        drawn.append(
            f'<rect x="{index * width}" y="{20 - height:.1f}" width="{width - 1}" height="{height:.1f}">'
            f"<title>{text(label)}: {number(value)}</title></rect>"
        )
    size = f'width="{width * len(values)}" height="20"'
    return Markup(f'<svg {size} role="img" fill="currentColor" fill-opacity=".65">{"".join(drawn)}</svg>')


def wash(value: float, most: float) -> str:
    """The background of a value between -most and most."""
    share = min(abs(value) / most, 1.0) if most > 0 else 0.0
    red, green, blue = ABOVE if value >= 0 else BELOW
    return f"rgba({red},{green},{blue},{STRONGEST * share:.2f})"


def legend(name: str, unit: str, least: float, most: float) -> str:
    """What the colours of tokens mean."""
    stops = [wash(least + (most - least) * step / 8, max(abs(least), abs(most))) for step in range(9)]
    scale = f'<span style="background:linear-gradient(to right,{",".join(stops)})"></span>'
    return f'<div class="sl-legend">{text(name)}: {number(least)} {scale} {number(most)} {text(unit)}</div>'


def fragment(*pieces: str) -> str:
    """Pieces with their style, as a notebook's cell takes them."""
    return f'<style>{STYLE}</style><div class="sl">{"".join(pieces)}</div>'


def page(title: str, body: str) -> str:
    """A whole document, for a file."""
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{text(title)}</title></head>'
        f'<body class="sl-page">{body}</body></html>\n'
    )


def _cell(cell: Any) -> str:
    if isinstance(cell, Markup):
        return f"<td>{cell}</td>"
    if isinstance(cell, float):
        return f'<td class="sl-n">{number(cell)}</td>'
    if isinstance(cell, int):
        return f'<td class="sl-n">{cell}</td>'
    return f"<td>{text(cell)}</td>"
