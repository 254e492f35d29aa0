"""Write docs/tutorials/ and docs/reproductions/ from the executed notebooks, as Markdown that every site builder reads.

python tools/tutorial_pages.py

One page a notebook, with its images as files; the README of each folder is its index. Standard library only, so that
the site builds without torch. The pages are not committed: the notebooks are.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("tutorials", "reproductions")
#: What is shown of an output, the first that it has. HTML of plotly needs its script and is left to its static image.
IMAGES = {"image/png": "png", "image/svg+xml": "svg"}


def main() -> None:
    """Make all pages anew."""
    for name in FOLDERS:
        notebooks, pages = ROOT / name, ROOT / "docs" / name
        shutil.rmtree(pages, ignore_errors=True)
        pages.mkdir(parents=True)
        for path in sorted(notebooks.glob("*.ipynb")):
            (pages / f"{path.stem}.md").write_text(page(path, pages), encoding="utf-8")
        index = links((notebooks / "README.md").read_text(encoding="utf-8"))
        (pages / "index.md").write_text(index, encoding="utf-8")


def page(path: Path, pages: Path) -> str:
    """A notebook as Markdown; its images are written into the folder of pages."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = []
    for number, cell in enumerate(cells):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(links(source))
        elif source.strip():
            parts.append(f"```python\n{source}\n```")
        for place, output in enumerate(cell.get("outputs", [])):
            parts.append(shown(output, pages / f"{path.stem}_{number}_{place}"))
    return "\n\n".join(part for part in parts if part) + "\n"


def shown(output: dict, file: Path) -> str:
    """One output: an image, which goes into a file of this name, a table, or text."""
    if output["output_type"] == "stream":
        return fenced("".join(output["text"]))
    data = output.get("data", {})
    for kind, ending in IMAGES.items():
        if kind in data:
            content = "".join(data[kind])
            raw = base64.b64decode(content) if ending == "png" else content.encode()
            file.with_suffix(f".{ending}").write_bytes(raw)
            return f"![Figure]({file.name}.{ending})"
    html = "".join(data.get("text/html", ""))
    if html and "<script" not in html:
        return '<div class="output" markdown="0">\n' + re.sub(r"\n\s*\n", "\n", html) + "\n</div>"
    return fenced("".join(data.get("text/plain", ""))) if not html else ""


def fenced(text: str) -> str:
    """Text as it was printed."""
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""


def links(text: str) -> str:
    """Links from the place of the page: notebooks are pages, READMEs indices, and docs/ is the folder above."""
    text = re.sub(r"\]\(([\w./]+)\.ipynb(#[^)]*)?\)", r"](\1.md\2)", text)
    text = re.sub(rf"\]\(((?:\.\./(?:{'|'.join(FOLDERS)})/)?)README\.md\)", r"](\1index.md)", text)
    return text.replace("](../docs/", "](../")


if __name__ == "__main__":
    main()
