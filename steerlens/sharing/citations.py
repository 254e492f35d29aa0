"""The papers of methods as BibTeX."""

from __future__ import annotations

import re
from importlib.resources import files


def bibtex() -> dict[str, str]:
    """The entry of each paper that a method comes from, by its number at arXiv."""
    entries = files("steerlens").joinpath("data", "methods.bib").read_text(encoding="utf-8").strip().split("\n\n")
    return {re.findall(r"eprint = \{(.*?)\}", entry)[0]: entry for entry in entries}


def arxiv_number(source: str) -> str:
    """The number of the paper that a method's source names first, or nothing."""
    return next(iter(re.findall(r"arXiv (\d{4}\.\d{5})", source)), "")
