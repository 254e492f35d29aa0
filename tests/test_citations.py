"""Every method's paper has an entry, and what docstrings and CITATION.cff say of a paper is what the entry says."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import pytest
import yaml

from steerlens import methods
from steerlens.fit.method import exported
from steerlens.sharing.citations import arxiv_number, bibtex

CITATION = Path(__file__).parents[1] / "CITATION.cff"
METHODS = exported(methods)


def field(entry, name):
    """A field of an entry without the braces that keep capitals and accents."""
    return re.sub(r"[{}]", "", re.search(rf"^  {name} = \{{(.*)\}},?$", entry, re.MULTILINE)[1])


def family_names(entry):
    return [author.partition(",")[0] for author in field(entry, "author").split(" and ")]


@pytest.mark.parametrize("number", sorted(bibtex()))
def test_an_entry_names_all_authors_and_the_year_of_its_number(number):
    entry = bibtex()[number]
    names = field(entry, "author").split(" and ")
    assert "others" not in names
    assert all(re.fullmatch(r"[^,]+, [^,]+", name) for name in names), names
    assert field(entry, "year") == f"20{number[:2]}"
    assert field(entry, "url") == f"https://arxiv.org/abs/{number}"


def test_no_paper_has_two_entries():
    text = (resources.files("steerlens") / "data" / "methods.bib").read_text(encoding="utf-8")
    numbers = re.findall(r"^  eprint = \{(.*)\}", text, re.MULTILINE)
    keys = re.findall(r"^@\w+\{(\w+),", text, re.MULTILINE)
    assert len(numbers) == len(set(numbers)) == len(keys) == len(set(keys)) == len(bibtex())


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_an_entry_by_the_authors_that_its_docstring_names(name):
    source = METHODS[name].source
    number = arxiv_number(source)
    if not number:
        return
    entry = bibtex()[number]
    named = re.search(r"([A-Z]\w+)(?: et al\.| and ([A-Z]\w+))[^.;]*?\(?(?:[A-Z]{4,} \d{4}, )?arXiv " + number, source)
    if named:
        names = family_names(entry)
        assert names[0] == named[1]
        assert named[2] is None or names == [named[1], named[2]]


def test_the_citation_file_says_what_the_entries_say():
    entries = bibtex()
    references = yaml.safe_load(CITATION.read_text(encoding="utf-8"))["references"]
    assert references
    for reference in references:
        (number,) = (own["value"].removeprefix("arXiv:") for own in reference["identifiers"])
        entry = entries[number]
        assert field(entry, "title") == reference["title"]
        assert family_names(entry) == [author["family-names"] for author in reference["authors"]]
        assert field(entry, "year") == str(reference["year"])
