"""An evaluation as Markdown."""

from __future__ import annotations

import math
from typing import Any

from steerlens.pages.markup import details, fragment, table, text

#: What no evaluation of this kind measures.
ELSEWHERE = "knowledge (MMLU and the like), a judge's opinion, longer texts, other languages"


def evaluation_card(found: Any) -> str:
    """The title, what was compared, the table, slopes, what is a proxy and what was not measured, and the protocol."""
    protocol = found.protocol
    about = found.meters[found.effect]
    proxies = [name for name, own in found.meters.items() if own["proxy"]]
    exact = "a proxy" if about["proxy"] else "likelihood (exact)" if about["needs"] == "logits" else "text"
    count = len(found.change(*found.arms[0]))
    lines = [
        f"**{found.effect}** ({about['unit']}), {count} held-out items"
        if found.calibrations
        else f"**{found.effect}** ({about['unit']}), {count} items",
        "",
    ]
    lines += [_table(found), ""]
    for arm, chosen in found.calibrations.items():
        low, high = chosen["interval"]
        note = f"; {chosen['note']}" if chosen["note"] else ""
        span = "" if math.isnan(low) else f" ({low:.3g} to {high:.3g})"
        lines.append(f"- {arm}: strength {chosen['strength']:.3g}{span}, {chosen['budget']}: {chosen['met']}{note}")
    lines += _slopes(found)
    lines.append(f"- scorer: {exact}" + (f"; proxies: {', '.join(proxies)}" if proxies else ""))
    lines.append(f"- not measured: {'; '.join([*found.missing, ELSEWHERE])}")
    lines.append(
        "- effect: change against unsteered, 95 % interval by a bootstrap over items, paired; worst: mean over "
        "the tenth of the items with the least change; wrong way: share of items moved against the aim; dose: |u|/|x|"
    )
    model = protocol.get("model", {})
    versions = ", ".join(f"{name} {version}" for name, version in protocol.get("versions", {}).items())
    lines.append(
        f"- {model.get('class')}, {model.get('n_layers')} layers, d = {model.get('d_model')}, {protocol.get('dtype')} "
        f"on {protocol.get('device')}; seed {protocol.get('seed')}; {versions}"
    )
    return "\n".join(lines)


def evaluation_html(found: Any) -> str:
    """The table, and the rest of the card folded under it."""
    card = evaluation_card(found).splitlines()
    title = card[0].replace("**", "")
    notes = "".join(f"<p>{text(line[2:])}</p>" for line in card if line.startswith("- "))
    return fragment(f"<p><b>Evaluation</b> &middot; {text(title)}</p>", table(*_cells(found)), details("notes", notes))


def _table(found: Any) -> str:
    names, rows = _cells(found)
    lines = [f"| {' | '.join(names)} |", f"| {' | '.join(['---'] * len(names))} |"]
    return "\n".join(lines + [f"| {' | '.join(cells)} |" for cells in rows])


def _cells(found: Any) -> tuple[list[str], list[list[str]]]:
    """Names of the columns, and a row of words for each arm and strength."""
    rows = found.table().reset_index().to_dict("records")
    ends = {f"{name} {end}".strip() for name in ("", *found.meters) for end in ("low", "high")}
    names = [name for name in rows[0] if name not in ends]
    several = len({own.seed for own in found.measured if own.arm == "random"})
    return names, [[_cell(name, row, several) for name in names] for row in rows]


def _cell(name: str, row: dict[str, Any], several: int) -> str:
    plain = row["arm"] == "unsteered"
    value = row[name]
    if name == "arm":
        return f"random x{several}" if value == "random" and several > 1 else str(value)
    if (plain and name in ("worst", "wrong way", "strength")) or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if name == "effect":
        return "0" if plain else f"{value:+.2f} [{row['low']:+.2f} {row['high']:+.2f}]"
    if name == "wrong way":
        return f"{100 * value:.0f} %"
    meter = name.removesuffix(" mean")
    if f"{meter} low" in row and not plain:
        return f"{value:.3g} [{row[f'{meter} low']:.3g} {row[f'{meter} high']:.3g}]"
    return f"{value:.3g}"


def _slopes(found: Any) -> list[str]:
    lines = []
    for arm in dict.fromkeys(name for name, _ in found.arms):
        if sum(name == arm for name, _ in found.arms) > 1:
            slopes = found.slopes(arm) * (found.meters[found.effect]["direction"] or 1)
            below = 100 * float((slopes < 0).double().mean())
            lines.append(f"- {arm}: slope per item: median {float(slopes.median()):.2f}, {below:.0f} % below 0")
    return lines
