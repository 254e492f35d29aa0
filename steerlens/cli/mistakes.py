"""What a command does about a mistake or an interrupt: one sentence and an exit code instead of a traceback."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperGroup

#: Exit codes, in addition to 0: it failed (or `doctor` found a fault); the call is wrong; it was interrupted.
FAILED, USAGE, INTERRUPTED = 1, 2, 130
#: Set, it shows the traceback of a mistake.
DEBUG = "STEERLENS_DEBUG"

#: What the library's messages call an argument, and how it is typed.
TYPED = {"pass trust=True": "give --trust to generate"}


class Commands(TyperGroup):
    """The commands as one group that reports what they raise."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command. The library's own errors carry the sentence to print; anything else is a fault of ours."""
        try:
            return super().invoke(ctx)
        # the first two end a command; the third means that the reader of a pipe has gone
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except (ValueError, TypeError, LookupError, OSError, ImportError, RuntimeError) as error:
            if os.environ.get(DEBUG):
                raise
            typer.echo(f"steerlens: {sentence(error)}", err=True)
            raise typer.Exit(FAILED) from None
        except KeyboardInterrupt:
            typer.echo("steerlens: stopped; nothing was left half-written", err=True)
            raise typer.Exit(INTERRUPTED) from None


def sentence(error: BaseException) -> str:
    """An exception in one line. What the system says of a file is put with its name; a KeyError loses its quotes."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])
    shown = " ".join(str(error).split()) or type(error).__name__
    for python, typed in TYPED.items():
        shown = shown.replace(python, typed)
    return shown


@contextlib.contextmanager
def quiet_output() -> Iterator[None]:
    """Send what libraries print while they load and fit to stderr: stdout is the command's answer alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
