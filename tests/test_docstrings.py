"""Every public name is on a page of the API and has a docstring that says what a machine can ask of it."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from pathlib import Path

import pytest

import steerlens as sl
from steerlens import models, testing
from steerlens.fit.method import exported

API = Path(__file__).parents[1] / "docs" / "api"
ROOMS = [getattr(sl, name) for name in sl.__all__ if inspect.ismodule(getattr(sl, name))]
MODULES = {module.__name__: module for module in (sl, *ROOMS, models, testing)}
#: Public names by full name: what can be documented, so no modules and no version.
PUBLIC = {
    f"{owner}.{name}": getattr(module, name)
    for owner, module in MODULES.items()
    for name in module.__all__
    if not inspect.ismodule(getattr(module, name)) and not name.startswith("__")
}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}


def document(value):
    return inspect.getdoc(value) or ""


def test_every_public_name_is_on_a_page():
    pages = "\n".join(page.read_text(encoding="utf-8") for page in API.glob("*.md"))
    headings = set(re.findall(r"heading: ([\w.]+)", pages))
    missing = {name for name in PUBLIC if name not in headings}
    # one name may be exported by the package and by its room: one entry is enough
    missing = {name for name in missing if not any(PUBLIC.get(other) is PUBLIC[name] for other in headings)}
    assert not missing, "put these on a page of docs/api:\n" + "\n".join(map(entry, sorted(missing)))


def entry(name):
    """What a page has for a public name."""
    value, short = PUBLIC[name], name.rpartition(".")[2]
    path = f"{value.__module__}.{getattr(value, '__qualname__', short)}"
    return f"::: {path}\n    options:\n      heading: {name}\n      toc_label: {short}\n"


def test_no_page_shows_what_is_not_public():
    for page in API.glob("*.md"):
        for heading in re.findall(r"heading: (steerlens\.[\w.]+)", page.read_text(encoding="utf-8")):
            owner, _, name = heading.rpartition(".")
            known = PUBLIC.get(heading) or heading == "steerlens.evaluate" or hasattr(sl.evaluate.datasets, name)
            assert known or owner.startswith("steerlens.fit"), f"{page.name} has {heading}"


@pytest.mark.parametrize("name", PUBLIC)
def test_a_docstring_begins_with_a_sentence(name):
    first = document(PUBLIC[name]).partition("\n\n")[0]
    assert re.search(r"[.:]$", first.strip()), f"{name}: {first!r}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_described(name):
    text = document(FUNCTIONS[name])
    for argument, parameter in inspect.signature(FUNCTIONS[name]).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        described = re.search(rf"^ *(?:`?\w+`?, )*{argument}(?:, \w+)*: ", text, re.MULTILINE)
        assert described or re.search(rf"`{argument}|\b{argument}\b", text), f"{name} does not describe {argument}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_a_function_raises_is_said(name):
    body = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(FUNCTIONS[name])))).body[0]
    own = [node for node in ast.walk(body) if isinstance(node, ast.Raise) and node.exc is not None]
    kinds = {ast.unparse(node.exc.func) for node in own if isinstance(node.exc, ast.Call)}
    # a function that makes the error has a name of its own
    kinds = {kind for kind in kinds if kind.endswith("Error")}
    said = document(FUNCTIONS[name])
    for kind in kinds:
        assert "Raises" in said, f"{name} raises {kind}, its docstring nothing"
        assert kind in said, f"{name} raises {kind} and does not say so"


@pytest.mark.parametrize("name", [name for name in PUBLIC if name not in ("steerlens.Signals",)])
def test_tensors_have_shapes(name):
    value = PUBLIC[name]
    target = value.__init__ if inspect.isclass(value) else value
    try:
        hints = inspect.signature(target)
    except (TypeError, ValueError):
        pytest.skip("no signature")
    # what a function that is given takes is said by its annotation
    tensors = [
        p.name for p in hints.parameters.values() if "Tensor" in re.sub(r"Callable\[.*\]", "", str(p.annotation))
    ]
    given = "Tensor" in str(hints.return_annotation)
    if tensors or given:
        # T and m are numbers of layers and rows, +1 counts one more
        assert re.search(r"\[[A-Za-z0-9_.+ ]+\]", document(value)), (
            f"{name} has {tensors or 'a result'} without a shape"
        )


@pytest.mark.parametrize("name", exported(sl.methods))
def test_a_method_has_equation_signals_and_source(name):
    text = document(getattr(sl, name))
    assert re.search(r"^ {4}\S.*[=<].*$", text, re.MULTILINE), f"{name} has no equation"
    assert "Recorded signals" in text
    assert re.search(r"^Source: .*", text, re.MULTILINE)


@pytest.mark.parametrize("name", PUBLIC)
def test_names_say_units(name):
    text = document(PUBLIC[name])
    for argument in re.findall(r"^ +(\w+_(?:rad|s|deg)): (.*)", text, re.MULTILINE):
        words = {"rad": "radian", "s": "second|longest wait|time", "deg": "degree"}[argument[0].rsplit("_", 1)[1]]
        assert re.search(words, text, re.IGNORECASE), f"{name}: {argument[0]} without its unit"
