"""The conformance suite: what every method promises on every host, as checks that anyone can run.

    for check in checks():
        check(Case("caa", "bridge"))

A method declares in its file what it cannot promise, and why: `EXCEPTIONS = {"check_name": "words of the error"}`. The
suite asserts that the check then really fails, with these words.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from steerlens.testing import promises
from steerlens.testing.case import Case, discover_hosts, discover_methods, padding, snapshot
from steerlens.testing.promises import check_runs_on_a_server

__all__ = [
    "Case",
    "check_runs_on_a_server",
    "checks",
    "discover_hosts",
    "discover_methods",
    "exceptions",
    "padding",
    "run_check",
    "snapshot",
]


def exceptions(method: str) -> dict[str, str]:
    """What a method declares that it cannot promise: check name to words of the error."""
    return getattr(importlib.import_module(f"steerlens.methods.{method}"), "EXCEPTIONS", {})


def checks() -> list[Callable[[Case], None]]:
    """All checks that need no server, in the order of the promises."""
    local = [function for name, function in vars(promises).items() if name.startswith("check_")]
    return [function for function in local if function is not check_runs_on_a_server]


def run_check(check: Callable[[Case], None], case: Case) -> None:
    """Run a check, or assert that a declared exception really fails with its message."""
    declared = exceptions(case.method).get(check.__name__)
    if declared is None:
        return check(case)
    said = None
    try:
        check(case)
    except Exception as error:
        said = str(error)
    assert said is not None, f"{case!r} declares that {check.__name__} fails ({declared!r}), but it passes"
    assert declared in said, f"{case!r} declares {declared!r} for {check.__name__}, it failed with {said!r}"
    return None
