"""Control vectors of llama.cpp and repeng, in GGUF files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerlens.core import Controller, Site
from steerlens.core.files import check_recipe
from steerlens.core.tensorfile import digest, parse_json
from steerlens.core.types import Layers, Where
from steerlens.laws.single import add
from steerlens.sharing.ggufile import read_gguf, write_gguf
from steerlens.sharing.plain import EVERY_TOKEN, merged, plain_loops

FORM = "a GGUF control vector"
ARCHITECTURE = "controlvector"
#: Keys of our own; other programs ignore them. What is done, where, the recipe, and a digest of it and the tensors.
OPERATION, POINT = "steerlens.operation", "steerlens.hook_point"
RECIPE, DIGEST = "steerlens.recipe", "steerlens.digest"
_NAME = re.compile(r"direction\.(\d{1,6})")


def from_gguf(
    path: str | Path,
    *,
    layers: Layers = None,
    where: Where = EVERY_TOKEN,
    strength: float = 1.0,
) -> Controller:
    """A control vector from a GGUF file, as `to_gguf`, repeng and llama.cpp's cvector-generator write it.

        x_l <- x_l + strength direction.l     at resid_post of block l, counted from 0, at every token

    This is where llama.cpp and repeng add `direction.l`: after block l. (The file's numbers begin with 1 because
    llama.cpp has no vector for block 0.)

    Args:
        path: The file. It is not executed, and read in memory of its own size.
        layers: Layers to steer, `--control-vector-layer-range` in llama.cpp; default all in the file.
        where: Token positions, see `Loop`.
        strength: As in `--control-vector-scaled`; default 1.

    Returns:
        One loop for each layer. If `to_gguf` wrote the file, the recipe holds that of the controller it came from, so
        that another model than its own is refused.

    Raises:
        OSError: no such file, or it cannot be read.
        ValueError: anything else: no control vector, a damaged one, one that is not finite, a layer that it lacks.
    """
    try:
        found, recipe = _read(path)
    except ValueError as error:
        raise ValueError(f"{path} was not loaded: {error}") from None
    if layers is None or isinstance(layers, str):  # "all"
        wanted = sorted(found)
    else:
        wanted = [layers] if isinstance(layers, int) else sorted(set(layers))
    missing = [layer for layer in wanted if layer not in found]
    if missing or not wanted:
        held = ", ".join(map(str, sorted(found)))
        raise ValueError(f"layers={layers!r}: {path} holds vectors for the layers {held}")
    loops = [
        loop.replace(name="gguf")
        for layer in wanted
        for loop in add(found[layer], layer=layer, where=where, strength=strength)
    ]
    return Controller(loops, recipe)


def to_gguf(controller: Controller, path: str | Path, *, model_hint: str | None = None) -> None:
    """Write a controller as a control vector for llama.cpp and repeng.

        llama-cli -m model.gguf --control-vector FILE

    What the file holds: `direction.l`, the vector that is added after block l, strength included, in float32; keys with
    the operation (`add`), the hook point (`resid_post`), the recipe, and a digest that `from_gguf` checks. A vector
    before block l is written as one after block l - 1, which is the same.

    Args:
        controller: Adds constant vectors to the residual stream, at every token.
        path: Where to write it; an older file is replaced when the new one is complete.
        model_hint: Architecture that repeng shows; default the name of the model that the controller was fitted on.

    Raises:
        OSError: it cannot be written there.
        ValueError: a loop that a control vector cannot express, by name: another law or point, other tokens, a gate, or
            a vector after block 0 or before it.
    """
    loops = plain_loops(controller, FORM)
    found: dict[int, Tensor] = {}
    for site, vector in merged(loops, FORM).items():
        layer = {"resid_post": site.layer, "resid_pre": site.layer - 1}.get(site.point)
        if layer is None or layer < 1:
            why = "llama.cpp has no vector for it" if layer is not None else "control vectors are at resid_post"
            name = next(loop.name for loop in loops if loop.act == site)
            raise ValueError(f"loop {name!r} acts at {site}, which {FORM} cannot express: {why}")
        found[layer] = found[layer] + vector if layer in found else vector
    names = [model["name"] for _, model in controller.fingerprints if model.get("name")]
    recipe = json.dumps(controller.recipe, allow_nan=False)
    directions = {f"direction.{layer}": found[layer] for layer in sorted(found)}
    keys: dict[str, str | int] = {
        "general.architecture": ARCHITECTURE,
        "general.type": "adapter",
        f"{ARCHITECTURE}.model_hint": model_hint or (str(names[0]) if names else "unknown"),
        f"{ARCHITECTURE}.layer_count": len(directions),
        OPERATION: "add",
        POINT: "resid_post",
        RECIPE: recipe,
        DIGEST: digest(recipe, directions),
    }
    write_gguf(path, keys, directions)


def _read(path: str | Path) -> tuple[dict[int, Tensor], dict[str, Any]]:
    """Vectors by layer, and the recipe."""
    keys, tensors = read_gguf(path, ARCHITECTURE)
    recipe: dict[str, Any] = {"method": "from_gguf", "arguments": {"file": Path(path).name}}
    hint = keys.get(f"{ARCHITECTURE}.model_hint")
    if isinstance(hint, str):
        recipe["arguments"]["model_hint"] = hint[:200]
    if keys.get(OPERATION, "add") != "add" or keys.get(POINT, "resid_post") != "resid_post":
        raise ValueError("its operation is not the addition to the residual stream after a block")
    text = keys.get(RECIPE)
    if text is not None:
        if not isinstance(text, str) or digest(text, tensors) != keys.get(DIGEST):
            raise ValueError("its content is not what was saved (the digest differs): it was damaged or altered")
        source = parse_json(text, "its recipe")
        if not isinstance(source, dict):
            raise ValueError("its recipe is no JSON object")
        check_recipe(source)
        recipe["parts"] = [source]
    found = {}
    for name, tensor in tensors.items():
        number = _NAME.fullmatch(name)
        if number is None:
            raise ValueError(f"its tensor {name[:60]!r} is no direction.<layer>")
        vector = tensor.flatten()
        if vector.numel() != max(tensor.shape, default=0) or not bool(torch.isfinite(vector).all()):
            raise ValueError(f"its {name} is no vector of finite numbers, it has shape {list(tensor.shape)}")
        found[Site(int(number[1])).layer] = vector
    if not found or len({len(vector) for vector in found.values()}) > 1:
        raise ValueError("it holds no vectors, or vectors of several lengths")
    return found, recipe
