"""What holds for every tutorial: its length, how it begins and ends, what it imports, links, pictures."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import jupytext
import nbformat
from dress import ROOT, TUTORIALS
from pictures import figures

#: Without blank ones and the marks between cells.
LINES = 150
#: Longest line of code, so that neither GitHub nor the site scrolls it sideways.
WIDTH = 80
#: Modules of the library that a tutorial may import from. A reproduction may reach deeper.
#: The last three are for methods of one's own.
PUBLIC = {
    "steerlens",
    *(f"steerlens.{name}" for name in ("diagnose", "evaluate", "models", "sae", "testing")),
    *(f"steerlens.fit.{name}" for name in ("card", "method", "reading")),
}
BEGINNING = ("**You will see", "**Time:")
ENDING = "## What was not shown"
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)#\s]+)[^)]*\)")
IMAGE = re.compile(r"!\[[^\]]*\]\(([^)#\s]+)[^)]*\)")


def broken_in_source(source: Path) -> list[str]:
    """What is wrong with a source, before it is executed."""
    if source not in TUTORIALS:
        return []
    text = source.read_text()
    cells = jupytext.read(source).cells
    wrong = wide(cells)
    filled = [line for line in text.splitlines() if line.strip("# ") and not line.startswith("# %%")]
    if len(filled) > LINES:
        wrong.append(f"{len(filled)} lines that are not blank; a tutorial has {LINES} at most")
    wrong += [f"does not begin with {words!r}" for words in BEGINNING if words not in cells[0].source]
    headings = [
        line
        for cell in cells
        for line in cell.source.splitlines()
        if cell.cell_type == "markdown" and line.startswith("#")
    ]
    if headings[-1] != ENDING:
        wrong.append(f"ends with {headings[-1]!r}, not with {ENDING!r}")
    for cell in cells:
        if cell.cell_type == "code":
            wrong += hidden_names(ast.parse(cell.source), {path.stem for path in source.parent.glob("*.py")})
    return [f"{source.name}: {line}" for line in wrong]


def wide(cells: list[nbformat.NotebookNode]) -> list[str]:
    """Lines of code that a reader would have to scroll."""
    lines = [line for cell in cells if cell.cell_type == "code" for line in cell.source.splitlines()]
    return [f"a line of code has {len(line)} characters, not {WIDTH}: {line}" for line in lines if len(line) > WIDTH]


def hidden_names(tree: ast.AST, local: set[str]) -> list[str]:
    """Imports of what is not public, and uses of names that begin with an underscore."""
    wrong = []
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [str(node.module)]
            wrong += [f"imports the private {name.name}" for name in node.names if name.name.startswith("_")]
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            wrong.append(f"uses the private .{node.attr}")
        for module in modules:
            if module.split(".")[0] == "steerlens" and module not in PUBLIC:
                wrong.append(f"imports {module}; public are {', '.join(sorted(PUBLIC))}")
            if module in local:
                wrong.append(f"imports {module}, a file beside it; a reader may have the notebook alone")
    return wrong


def broken_in_notebook(target: Path) -> list[str]:
    """What is wrong with a notebook as it is committed."""
    notebook = nbformat.read(target, 4)
    wrong = [
        f"a figure without a picture: {output.data.keys()}"
        for output in figures(notebook)
        if "image/png" not in output.data
    ]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            links = [*LINK.findall(cell.source), *IMAGE.findall(cell.source)]
            inside = [link for link in links if "://" not in link]
            wrong += [f"a link to {link}, which is not there" for link in inside if not (target.parent / link).exists()]
        for output in cell.get("outputs", []):
            said = output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
            if str(ROOT) in said or str(Path.home()) in said:
                wrong.append(f"an output names a folder of the machine that built it: {said[:200]}")
            if output.output_type == "error":
                wrong.append(f"an error in its outputs: {output.evalue}")
    return [f"{target.name}: {line}" for line in wrong]
