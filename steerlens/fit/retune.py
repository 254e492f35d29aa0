"""Other values of a fitted controller's arguments without a refit: what `Controller.retuned` does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from steerlens.core import Controller, Law, Loop
from steerlens.core.law import finite
from steerlens.core.part import Part
from steerlens.core.tables import VIEWS
from steerlens.core.types import Json
from steerlens.fit.recipe import plain
from steerlens.laws.relative import Relative

Kind = TypeVar("Kind", bound=Part)


@dataclass
class Draft:
    """A controller of one method while its arguments are changed. A method's function edits it in place.

    Attributes:
        loops: Its loops.
        changes: The new values, as the user gave them.
        arguments: All arguments of the recipe, with the new values.
        found: What the fit found.
        before: The arguments without the new values.
    """

    loops: list[Loop]
    changes: Mapping[str, Any]
    arguments: dict[str, Any]
    found: dict[str, Any]
    before: Json

    def laws(self, change: Callable[[Any, Loop], Law]) -> None:
        """Replace the law of every loop by a function of the law and the loop; `Relative` stays around it."""
        for index, loop in enumerate(self.loops):
            law = loop.law
            new = Relative(change(law.law, loop), law.off) if isinstance(law, Relative) else change(law, loop)
            self.loops[index] = loop.replace(law=new)

    def scale(self, name: str) -> float:
        """The factor from the present value of an argument to the new one; multiplies the strength of every loop.

        Raises:
            TypeError, ValueError: the new value is no finite number.
            ValueError: the present value is 0.
        """
        factor = ratio(name, self.changes[name], self.before[name])
        self.loops = [loop.replace(strength=loop.strength * factor) for loop in self.loops]
        return factor


@dataclass(frozen=True)
class Retune:
    """The arguments that a method can change without a refit, and how. `strength` needs no declaration.

    Args:
        names: The arguments, or a function from a recipe to them, if they depend on it.
        change: Edits the draft.
    """

    names: Collection[str] | Callable[[Json], Collection[str]] = ()
    change: Callable[[Draft], None] | None = None

    def own(self, recipe: Json) -> set[str]:
        """Names of the arguments that `change` changes in a controller with this recipe."""
        if callable(self.names):
            return set(self.names(recipe))
        return set(self.names) & set(recipe.get("arguments") or ())

    def legal(self, recipe: Json) -> list[str]:
        """Names of all arguments that can be changed in a controller with this recipe."""
        return sorted(self.own(recipe) | ({"strength"} & set(recipe.get("arguments") or ())))


#: By the method that a recipe names. Controllers of one vector have a strength only.
RETUNES: dict[str, Retune] = {"add": Retune(), "project_out": Retune()}


def ratio(name: str, new: Any, old: float) -> float:
    """The factor from the present value of an argument to a new one.

    Raises:
        TypeError, ValueError: the new value is no finite number.
        ValueError: the present value is 0.
    """
    number = finite(name, new)
    if not old:
        raise ValueError(f"the controller has {name}=0, which no factor changes to {number:g}; fit it with another one")
    return number / float(old)


def edited(part: Kind, **attributes: Any) -> Kind:
    """A copy of a part with other values of some attributes, checked as one from a file is."""
    new = copy.copy(part)
    for name, value in attributes.items():
        assert name in vars(part), f"{type(part).__name__} has no attribute {name}"
        setattr(new, name, value)
    new.validate()
    return new


def retuned(controller: Controller, changes: Mapping[str, Any]) -> Controller:
    """What `Controller.retuned` returns; see there."""
    if not changes:
        raise ValueError(f"retuned() without an argument; {_offer(_leaves(controller.recipe))}")
    leaves = _leaves(controller.recipe)
    for name in changes:
        if not any(name in _legal(leaf) for leaf, _ in leaves):
            raise ValueError(f"{_refusal(name, leaves)}; {_offer(leaves)}")
    loops, recipe = _retuned(list(controller.loops), controller.recipe, changes, 0)
    return Controller(loops, recipe)


VIEWS["retune"] = retuned


def _retuned(loops: list[Loop], recipe: Json, changes: Mapping[str, Any], start: int) -> tuple[list[Loop], Json]:
    """Loops, those of other summands untouched, and the recipe of the controller whose groups begin at a number."""
    if recipe.get("method") == "+":
        parts = []
        for part, size in zip(recipe["parts"], recipe["groups"], strict=True):
            mine = [index for index, loop in enumerate(loops) if start <= loop.group < start + size]
            moved, new = _retuned([loops[index] for index in mine], part, changes, start)
            for index, loop in zip(mine, moved, strict=True):
                loops[index] = loop
            parts.append(new)
            start += size
        return loops, {**recipe, "parts": parts}
    legal = _legal(recipe)
    own = {name: value for name, value in changes.items() if name in legal}
    return _leaf(loops, recipe, own) if own else (loops, recipe)


def _leaf(loops: list[Loop], recipe: Json, changes: Mapping[str, Any]) -> tuple[list[Loop], Json]:
    declared, before = RETUNES[recipe["method"]], recipe.get("arguments") or {}
    found = copy.deepcopy(recipe.get("found") or {})
    draft = Draft(loops, changes, {**before, **plain(changes)}, found, before)
    own = declared.own(recipe)
    if declared.change is not None and not own.isdisjoint(changes):
        declared.change(draft)
    if "strength" in changes and "strength" not in own:
        draft.scale("strength")
    changed = [name for name in draft.arguments if draft.arguments[name] != before.get(name)]
    # of several changes the values of the fit are kept
    at_fit = {name: before.get(name) for name in changed}
    if "targets" in found and draft.found["targets"] != recipe["found"]["targets"]:
        at_fit["targets"] = recipe["found"]["targets"]
    at_fit |= recipe.get("retuned", {})
    new = {**recipe, "arguments": draft.arguments, "retuned": at_fit}
    return draft.loops, new | ({"found": draft.found} if "found" in recipe else {})


def _leaves(recipe: Json) -> list[tuple[Json, str]]:
    """The recipes of the summands, and their methods."""
    if recipe.get("method") == "+":
        if "groups" not in recipe:
            raise ValueError("this sum does not record which loops belong to which summand; add the summands up again")
        return [leaf for part in recipe["parts"] for leaf in _leaves(part)]
    return [(recipe, str(recipe.get("method", "a controller of your own")))]


def _legal(recipe: Json) -> list[str]:
    declared = RETUNES.get(str(recipe.get("method")))
    return [] if declared is None else declared.legal(recipe)


def _refusal(name: str, leaves: Iterable[tuple[Json, str]]) -> str:
    knowing = [method for leaf, method in leaves if name in (leaf.get("arguments") or {})]
    if knowing and name == "where":
        return "where= is moved by controller.at(where)"
    if knowing:
        return f"{name} enters the fit of {' and '.join(dict.fromkeys(knowing))}: fit again to change it"
    return f"{' and '.join(dict.fromkeys(method for _, method in leaves))} has no argument {name!r}"


def _offer(leaves: Iterable[tuple[Json, str]]) -> str:
    offers = {method: ", ".join(_legal(leaf)) or "nothing" for leaf, method in leaves}
    return "; ".join(f"{method} changes without a refit: {names}" for method, names in offers.items())
