"""Put the table of docs/measured.md into README.md, with fewer columns.

python tools/readme_measured.py

`tests/test_docs.py` fails if the README's is another.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
START, END = "<!-- measured: python tools/readme_measured.py -->", "<!-- end of measured -->"
#: Columns of the page, and how the README calls them.
COLUMNS = {"arm": "arm", "effect": "effect", "wrong way": "wrong way", "neutral loss": "neutral loss"}


def main() -> None:
    """Write the README anew."""
    path = ROOT / "README.md"
    before, rest = path.read_text(encoding="utf-8").split(START, 1)
    path.write_text(f"{before}{START}\n{short()}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")


def short() -> str:
    """The table of docs/measured.md in the README's columns."""
    page = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    table = re.search(r"^\| arm \|.*?(?=\n\n)", page, re.MULTILINE | re.DOTALL)
    assert table is not None, "docs/measured.md has no table that begins with | arm |"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[0].splitlines()]
    chosen = [rows[0].index(name) for name in COLUMNS]
    lines = [list(COLUMNS.values()), ["---"] * len(COLUMNS), *([row[at] for at in chosen] for row in rows[2:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
