"""The command line."""

from __future__ import annotations

import sys


def main() -> None:
    """`steerlens`, as it is installed; without typer and rich one sentence instead of a traceback."""
    try:
        from steerlens.cli.__main__ import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "click"):
            raise
        sys.exit(f"steerlens: the command line needs {error.name}; pip install 'steerlens[demo]'")
    app()
