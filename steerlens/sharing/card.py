"""The page of a controller on the Hub: what it is, where it acts, what it was made from, and whom to cite."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from steerlens import methods
from steerlens.core import Controller, Loop
from steerlens.fit.method import exported
from steerlens.hosts.dimensions import plain_name
from steerlens.sharing.citations import arxiv_number, bibtex
from steerlens.version import __version__

#: Rows of the table of loops at most.
MOST_ROWS = 64
_SIZES = ("n_layers", "d_model", "n_heads", "d_vocab")
#: A name on the Hub: `user/name`.
_REPO = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
_SOFTWARE = """@software{steerlens,
  author = {{The steerlens contributors}},
  title = {steerlens: Steering of language models as feedback control},
  version = {%s}
}"""


def model_card(
    controller: Controller,
    repo: str,
    *,
    file: str,
    license: str | None = None,
    data_license: str | None = None,
    evaluation: Any = None,
) -> str:
    """The page as Markdown with the Hub's metadata in front, made from the controller's recipe.

    Args:
        controller: With its recipe.
        repo: `user/name`.
        file: Name of the controller's file there.
        license: Of the controller, as the Hub abbreviates it: `"mit"`.
        data_license: Of what it was fitted on.
        evaluation: What `steerlens.compare` returned, or its page as Markdown.
    """
    recipes = list(_recipes(controller.recipe))
    sources = _sources(recipes)
    lines = [*_metadata(recipes, license), "", f"# {_text(repo.rpartition('/')[2])}", ""]
    lines += [f"A steering controller for language models, {_text(repr(controller))}. Load it:", ""]
    lines += ["```python", "import steerlens as sl", f'controller = sl.Controller.from_hub("{repo}"{_option(file)})']
    lines += ["with sl.steer(model, controller): print(model.generate(prompt))", "```", ""]
    lines += ["## What it is", "", *_made(recipes, data_license)]
    lines += ["## Where it acts", "", *_places(controller)]
    if evaluation is not None:
        page = evaluation if isinstance(evaluation, str) else evaluation.card()
        lines += ["## Evaluation", "", page, ""]
    lines += ["## How to cite", ""]
    lines += [f"- {_text(name)}: {_text(source)}" for name, source in sources.items()] + [""] * bool(sources)
    entries = bibtex()
    numbers = dict.fromkeys(arxiv_number(source) for source in sources.values())
    cited = [entries[number] for number in numbers if number in entries]
    lines += ["```bibtex", "\n\n".join([*cited, _SOFTWARE % __version__]), "```"]
    return "\n".join(lines) + "\n"


def _option(file: str) -> str:
    return "" if file == "controller.safetensors" else f", file={json.dumps(file)}"


def _recipes(recipe: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """A recipe, or those of which it is the sum."""
    parts = recipe.get("parts") or ()
    if recipe.get("method") != "+":
        yield recipe
    for part in parts:
        yield from _recipes(part)


def _sources(recipes: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    known = exported(methods)
    names = dict.fromkeys(str(recipe.get("method")) for recipe in recipes)
    return {name: known[name].source for name in names if name in known and known[name].source}


def _metadata(recipes: Iterable[Mapping[str, Any]], license: str | None) -> list[str]:
    """The Hub's front matter; every value is quoted, as JSON is YAML."""
    recipes = list(recipes)
    names = [str(recipe.get("method")) for recipe in recipes if recipe.get("method")]
    tags = dict.fromkeys(["steerlens", "activation-steering", *(name for name in names if name.isidentifier())])
    models = dict.fromkeys(plain_name(str((recipe.get("model") or {}).get("name", ""))) for recipe in recipes)
    bases = [name for name in models if _REPO.fullmatch(name) and not name.startswith("steerlens/")]
    found: dict[str, Any] = {"library_name": "steerlens", "tags": list(tags)}
    found |= {"license": license} if license else {}
    found |= {"base_model": bases} if bases else {}
    return ["---", *(f"{key}: {json.dumps(value)}" for key, value in found.items()), "---"]


def _made(recipes: Iterable[Mapping[str, Any]], data_license: str | None) -> list[str]:
    lines = []
    for recipe in recipes:
        rows: list[tuple[str, Any]] = [("method", recipe.get("method", "not known"))]
        rows += [(f"`{key}`", value) for key, value in dict(recipe.get("arguments") or {}).items()]
        rows += [(f"found: `{key}`", value) for key, value in dict(recipe.get("found") or {}).items()]
        model = recipe.get("model") or {}
        if model:
            sizes = ", ".join(
                f"{key} {model[key]}" for key in ("n_layers", "d_model", "n_heads", "d_vocab") if key in model
            )
            weights = "folded norms, centred writes" if model.get("processed") else "as published"
            name = plain_name(str(model.get("name") or "not named"))
            rows += [("model", name), ("its sizes", sizes), ("its weights", weights)]
            rows += [("fingerprint of its weights", model.get("probe"))]
        if recipe.get("data") is not None:
            rows += [("data, SHA-256", recipe["data"])]
            rows += [("licence of the data", data_license)] if data_license else []
        rows += [("steerlens", recipe["steerlens"])] if "steerlens" in recipe else []
        lines += ["| | |", "| --- | --- |", *(f"| {_text(name)} | {_text(value)} |" for name, value in rows), ""]
    return lines


def _places(controller: Controller) -> list[str]:
    lines = ["| hook point | law | tokens | strength | norm |", "| --- | --- | --- | --- | --- |"]
    for loop in controller.loops[:MOST_ROWS]:
        cells = (str(loop.act), type(loop.law).__name__, where_text(loop), f"{loop.strength:g}", norm_text(loop))
        lines.append(f"| {' | '.join(map(_text, cells))} |")
    more = len(controller) - MOST_ROWS
    return [*lines, f"\n{more} more loops" if more > 0 else ""]


def where_text(loop: Loop) -> str:
    """A loop's tokens in a word or two, and its gates."""
    where = loop.where
    if isinstance(where, slice):
        start, stop = ("" if bound is None else bound for bound in (where.start, where.stop))
        shown = "every token" if start in ("", 0) and stop == "" else f"{start}:{stop}"
    else:
        shown = (
            f"mask {list(where.shape)}"
            if isinstance(where, Tensor)
            else str(where)
            if isinstance(where, str)
            else "a function"
        )
    extra = ["gated"] * bool(loop.gates) + ["scheduled"] * bool(loop.schedules)
    return ", ".join([shown, *extra])


def norm_text(loop: Loop) -> str:
    """The norm of the vector that a loop adds, times its strength; nothing if its control depends on the state."""
    vector = getattr(loop.law, "vector", None)
    return f"{float(vector.float().norm()) * abs(loop.strength):.4g}" if isinstance(vector, Tensor) else "-"


def _text(value: Any) -> str:
    """A value in one line of a table: recipes may hold any text, and a file may come from anybody."""
    shown = value if isinstance(value, str) else json.dumps(value, default=str)
    shown = " ".join(shown.split())
    shown = shown if len(shown) <= 300 else f"{shown[:300]}..."
    for letter, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "&#124;"), ("[", "&#91;"), ("]", "&#93;")):
        shown = shown.replace(letter, safe)
    return shown
