"""Execute the tutorials, `NN_name.py` in percent format, and write the notebooks beside them.

python tutorials/build.py           # write NN_name.ipynb with fresh outputs
python tutorials/build.py --check   # execute, write nothing, fail on an error or a missing notebook
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="stems, as 01_quickstart; default all")
    parser.add_argument("--check", action="store_true", help="execute only")
    parser.add_argument("--setup", default="", help="code to run first in each notebook, not kept in it")
    arguments = parser.parse_args()
    sources = [path for path in sorted(HERE.glob("[0-9][0-9]_*.py")) if wanted(path.stem, arguments.names)]
    for source in sources:
        start = time.monotonic()
        notebook = jupytext.read(source)
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook.cells.insert(0, nbformat.v4.new_code_cell(arguments.setup))
        resources = {"metadata": {"path": str(HERE)}}
        NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
        del notebook.cells[0]
        target = source.with_suffix(".ipynb")
        if arguments.check:
            if not target.exists() or sources_of(nbformat.read(target, 4)) != sources_of(notebook):
                print(f"{target.name} is missing or older than {source.name}; run python tutorials/build.py")
                return 1
        else:
            nbformat.write(tidy(notebook), target)
        print(f"{source.name}: {time.monotonic() - start:.0f} s")
    return 0


def wanted(stem: str, names: list[str]) -> bool:
    """Whether to execute a tutorial; the remote one needs a server, so the remote tests ask for it by name."""
    return stem in names if names else "remote" not in stem


def sources_of(notebook: nbformat.NotebookNode) -> list[str]:
    """The cells without their outputs."""
    return [cell.source.strip() for cell in notebook.cells]


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Drop what changes from run to run without meaning: times, progress bars on stderr, cell ids."""
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{index}"
        cell.get("metadata", {}).pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


if __name__ == "__main__":
    sys.exit(main())
