"""Execute the tutorials and reproductions, percent-format Python, and write the notebooks beside them.

python tutorials/build.py             # write every notebook with fresh outputs
python tutorials/build.py --check     # check, execute, write nothing; fail on an error or a notebook that is not current
python tutorials/build.py --text      # text, links and layout only: keep the outputs, refuse code that does another thing
python tutorials/build.py 01_quickstart 02_hold_a_feature
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jupytext
import nbformat
from dress import INSTALL, ROOT, SOURCES, dressed
from nbclient import NotebookClient
from pictures import add_pictures
from rules import broken_in_notebook, broken_in_source

#: A bar says nothing once it is full, and a reader's Jupyter has the widgets that tqdm misses here. Other warnings stay.
QUIET = {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}
#: Printed when bitsandbytes is imported, which the tests need and a reader does not.
NOISE = re.compile(r"Failed to load CPU gemm_4bit_forward[^\n]*\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="stems, as 01_quickstart; default all")
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--text", action="store_true", help="execute nothing")
    parser.add_argument("--setup", default="", help="code to run first in each notebook, not kept in it")
    parser.add_argument("--jobs", type=int, default=2, help="notebooks at once; each uses one core")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - {source.stem for source in SOURCES}
    if unknown:
        parser.error(f"no {', '.join(sorted(unknown))}; there are {', '.join(source.stem for source in SOURCES)}")
    chosen = [source for source in SOURCES if not arguments.names or source.stem in arguments.names]
    broken = [line for source in chosen for line in broken_in_source(source)]
    if not broken:
        with ThreadPoolExecutor(arguments.jobs) as pool:
            for lines in pool.map(lambda source: built(source, arguments), chosen):
                broken += lines
    print(*broken, sep="\n")
    return bool(broken)


def built(source: Path, arguments: argparse.Namespace) -> list[str]:
    """Builds or checks one notebook; returns what is wrong."""
    notebook, target = dressed(jupytext.read(source), source), source.with_suffix(".ipynb")
    if arguments.text:
        wrong = keep_outputs(notebook, target)
        if wrong:
            return wrong
    else:
        start = time.monotonic()
        try:
            execute(notebook, source.parent, arguments.setup)
        except Exception as error:  # whatever a cell raises, the others are still built
            return [f"{source.name}: {error}"]
        print(f"{source.name}: {time.monotonic() - start:.0f} s", flush=True)
    if arguments.check:
        return stale(notebook, target) or broken_in_notebook(target)
    add_pictures(notebook)
    nbformat.write(tidy(notebook), target)
    return broken_in_notebook(target)


def execute(notebook: nbformat.NotebookNode, folder: Path, setup: str) -> None:
    """Runs all cells, plotly's figures as data; pictures are made from these afterwards."""
    notebook.cells.insert(0, nbformat.v4.new_code_cell(setup))
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PLOTLY_RENDERER": "plotly_mimetype", "PYTHONPATH": path} | QUIET
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)
    del notebook.cells[0]


def keep_outputs(notebook: nbformat.NotebookNode, target: Path) -> list[str]:
    """Takes the outputs of the notebook that was built before, if its code does the same."""
    if not target.exists():
        return [f"{target.name} is missing; build it without --text"]
    # the cell that installs has no output, and changes with the text
    code, old = (
        [cell for cell in each.cells if cell.cell_type == "code" and not cell.source.startswith(INSTALL[:20])]
        for each in (notebook, nbformat.read(target, 4))
    )
    # the same tree: lines may be broken elsewhere
    if [ast.dump(ast.parse(cell.source)) for cell in code] != [ast.dump(ast.parse(cell.source)) for cell in old]:
        return [f"{target.name} has other code than its source; build it without --text"]
    for cell, before in zip(code, old, strict=True):
        cell.outputs, cell.execution_count = before.outputs, before.execution_count
    return []


def stale(notebook: nbformat.NotebookNode, target: Path) -> list[str]:
    """Whether the committed notebook has the cells of its source."""
    if target.exists():
        cells = [[cell.source.strip() for cell in each.cells] for each in (notebook, nbformat.read(target, 4))]
        if cells[0] == cells[1]:
            return []
    return [f"{target.name} is missing or older than its source; run python tutorials/build.py {target.stem}"]


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Drops what changes from run to run without meaning: times, cell ids, where a printed text was cut, the folder."""
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{index}"
        cell.get("metadata", {}).pop("execution", None)
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                output.text = NOISE.sub("", output.text.replace(f"{ROOT}{os.sep}", ""))
        if cell.cell_type == "code":
            cell.outputs = joined([output for output in cell.outputs if output.get("text", "any").strip()])
    return notebook


def joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Outputs of which those of one stream that follow each other are one: a page shows a gap between two of them."""
    whole: list[nbformat.NotebookNode] = []
    for output in outputs:
        # a figure or a table has no name of a stream
        if whole and output.get("name") and output.get("name") == whole[-1].get("name"):
            whole[-1].text += output.text
        else:
            whole.append(output)
    return whole


if __name__ == "__main__":
    sys.exit(main())
