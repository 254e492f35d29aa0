"""Write docs/tutorials/ from the executed notebooks, as plain Markdown that every site builder reads.

python tools/tutorial_pages.py

One page a notebook, with its images as files, and an index. Standard library only, so that the site builds without
torch. The pages are not committed: the notebooks are.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOTEBOOKS, PAGES = ROOT / "tutorials", ROOT / "docs" / "tutorials"
#: What is shown of an output, the first that it has. HTML of plotly needs its script and is left to its static image.
IMAGES = {"image/png": "png", "image/svg+xml": "svg"}


def main() -> None:
    """Make all pages anew."""
    shutil.rmtree(PAGES, ignore_errors=True)
    PAGES.mkdir(parents=True)
    lines = []
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        text = page(path)
        (PAGES / f"{path.stem}.md").write_text(text, encoding="utf-8")
        lines.append(f"- [{title(text)}]({path.stem}.md)")
    intro = "Executed notebooks, each under three minutes on two cores; their files are in `tutorials/`."
    (PAGES / "index.md").write_text(f"# Tutorials\n\n{intro}\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


def page(path: Path) -> str:
    """A notebook as Markdown; its images are written beside it."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = []
    for number, cell in enumerate(cells):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(links(source))
        elif source.strip():
            parts.append(f"```python\n{source}\n```")
        for place, output in enumerate(cell.get("outputs", [])):
            parts.append(shown(output, f"{path.stem}_{number}_{place}"))
    return "\n\n".join(part for part in parts if part) + "\n"


def shown(output: dict, name: str) -> str:
    """One output: an image, a table, or text."""
    if output["output_type"] == "stream":
        return fenced("".join(output["text"]))
    data = output.get("data", {})
    for kind, ending in IMAGES.items():
        if kind in data:
            content = "".join(data[kind])
            raw = base64.b64decode(content) if ending == "png" else content.encode()
            (PAGES / f"{name}.{ending}").write_bytes(raw)
            return f"![Figure]({name}.{ending})"
    html = "".join(data.get("text/html", ""))
    if html and "<script" not in html:
        return '<div class="output" markdown="0">\n' + re.sub(r"\n\s*\n", "\n", html) + "\n</div>"
    return fenced("".join(data.get("text/plain", ""))) if not html else ""


def fenced(text: str) -> str:
    """Text as it was printed."""
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""


def links(text: str) -> str:
    """A notebook's links, from the page's place: notebooks are pages, and docs/ is the folder above."""
    text = re.sub(r"\]\((\w+)\.ipynb(#[^)]*)?\)", r"](\1.md\2)", text)
    return text.replace("](../docs/", "](../")


def title(text: str) -> str:
    """The first heading."""
    return next((line.lstrip("# ") for line in text.splitlines() if line.startswith("# ")), "Tutorial")


if __name__ == "__main__":
    main()
