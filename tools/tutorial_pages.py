"""Write docs/tutorials/ and docs/reproductions/ from the executed notebooks, as Markdown that every site builder reads.

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
#: Folders of notebooks, and what their index says.
FOLDERS = {
    "tutorials": "Executed notebooks, each under three minutes on two cores; their files are in `tutorials/`.",
    "reproductions": "What [papers](../papers.md) say about their methods, computed anew, in `reproductions/`.",
}
#: What is shown of an output, the first that it has. HTML of plotly needs its script and is left to its static image.
IMAGES = {"image/png": "png", "image/svg+xml": "svg"}


def main() -> None:
    """Make all pages anew."""
    for folder, intro in FOLDERS.items():
        pages = ROOT / "docs" / folder
        shutil.rmtree(pages, ignore_errors=True)
        pages.mkdir(parents=True)
        lines = []
        for path in sorted((ROOT / folder).glob("*.ipynb")):
            text = page(path, pages)
            (pages / f"{path.stem}.md").write_text(text, encoding="utf-8")
            lines.append(f"- [{title(text)}]({path.stem}.md)")
        text = f"# {folder.capitalize()}\n\n{intro}\n\n" + "\n".join(lines) + "\n"
        (pages / "index.md").write_text(text, encoding="utf-8")


def page(path: Path, pages: Path) -> str:
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
            parts.append(shown(output, pages / f"{path.stem}_{number}_{place}"))
    return "\n\n".join(part for part in parts if part) + "\n"


def shown(output: dict, image: Path) -> str:
    """One output: an image, a table, or text.

    Args:
        output: Of a code cell.
        image: Where an image is written, without its ending.
    """
    if output["output_type"] == "stream":
        return fenced("".join(output["text"]))
    data = output.get("data", {})
    for kind, ending in IMAGES.items():
        if kind in data:
            content = "".join(data[kind])
            raw = base64.b64decode(content) if ending == "png" else content.encode()
            image.with_name(f"{image.name}.{ending}").write_bytes(raw)
            return f"![Figure]({image.name}.{ending})"
    html = "".join(data.get("text/html", ""))
    if html and "<script" not in html:
        return '<div class="output" markdown="0">\n' + re.sub(r"\n\s*\n", "\n", html) + "\n</div>"
    return fenced("".join(data.get("text/plain", ""))) if not html else ""


def fenced(text: str) -> str:
    """Text as it was printed."""
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""


def links(text: str) -> str:
    """A notebook's links, from the page's place: notebooks are pages, a README the index, docs/ the folder above."""
    text = re.sub(r"\]\(([\w./]+)\.ipynb(#[^)]*)?\)", r"](\1.md\2)", text)
    text = re.sub(r"(?<=[(/])README\.md\)", "index.md)", text)
    return text.replace("](../docs/", "](../")


def title(text: str) -> str:
    """The first heading."""
    return next((line.lstrip("# ") for line in text.splitlines() if line.startswith("# ")), "Tutorial")


if __name__ == "__main__":
    main()
