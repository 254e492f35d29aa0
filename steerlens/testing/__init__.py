"""The conformance suite: what every method promises on every host, as checks that anyone can run.

    for check in checks():
        check(Case("caa", "bridge"))

A method declares what it cannot promise, and why: `@method(exceptions={"check_name": "words of the error"})`, or
`{"hooked": "words"}` if it cannot be fitted on a host at all. The suite asserts that the check, or the fit, then
really fails, with these words.
"""

from __future__ import annotations

from collections.abc import Callable

from steerlens import methods
from steerlens.fit.method import exported
from steerlens.testing import declarations, promises, sequences
from steerlens.testing.case import Case, discover_hosts, discover_methods, padding, snapshot
from steerlens.testing.counts import Counts, count_per_token, counts_of_steering
from steerlens.testing.memory import peak
from steerlens.testing.promises import check_runs_on_a_server

__all__ = [
    "Case",
    "Counts",
    "check_runs_on_a_server",
    "checks",
    "count_per_token",
    "counts_of_steering",
    "discover_hosts",
    "discover_methods",
    "exceptions",
    "padding",
    "peak",
    "run_check",
    "snapshot",
]


def exceptions(method: str) -> dict[str, str]:
    """What a method declares that it cannot promise: name of a check or host to words of the error."""
    return exported(methods)[method].exceptions


def checks() -> list[Callable[[Case], None]]:
    """All checks that need no server."""
    found = [*vars(promises).items(), *vars(declarations).items(), *vars(sequences).items()]
    local = [function for name, function in found if name.startswith("check_")]
    return [function for function in local if function is not check_runs_on_a_server]


def run_check(check: Callable[[Case], None], case: Case) -> None:
    """Run a check on a case, or assert that a declared exception really fails with its message."""
    declared = case.declared.exceptions
    if case.host in declared:
        return _must_fail(case.fit, "the fit", declared[case.host], case)
    if check.__name__ in declared:
        return _must_fail(lambda: check(case), check.__name__, declared[check.__name__], case)
    return check(case)


def _must_fail(call: Callable[[], object], what: str, words: str, case: Case) -> None:
    message = None
    try:
        call()
    except Exception as error:
        message = str(error)
    assert message is not None, f"{case!r} declares that {what} fails ({words!r}), but it passes"
    assert words in message, f"{case!r} declares {words!r} for {what}, it failed with {message!r}"
