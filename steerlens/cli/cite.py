"""Where each method comes from, read from its docstring."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

from steerlens import methods


def method_sources(names: Iterable[str] | None = None) -> dict[str, tuple[str, str]]:
    """`{method: (first line, source)}` of the docstrings.

    Raises:
        ValueError: a name that is no method.
    """
    found = {}
    for name in methods.__all__ if names is None else names:
        function = getattr(methods, name, None)
        if function is None:
            raise ValueError(f"no method {name!r}; there are {', '.join(methods.__all__)}")
        document = inspect.getdoc(function) or ""
        _, _, source = document.partition("Source: ")
        found[name] = (document.partition("\n")[0], " ".join(source.split("\n\n")[0].split()))
    return found
