"""The dictionary of lm-eval's `steered` model: module paths, and a vector to add or a level to clamp to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerlens.core import Controller, Loop
from steerlens.core.law import finite
from steerlens.core.types import Json, Where
from steerlens.hosts.types import Model
from steerlens.laws.feedback import Add, Project
from steerlens.sharing.modules import Names
from steerlens.sharing.plain import EVERY_TOKEN, added, clamped, need_every_token, plain_loops, refuse
from steerlens.sharing.torchfile import read_torch, write_torch

FORM = "lm-eval's steered model"
_KEYS = {"steering_vector", "steering_coefficient", "action", "bias", "head_index", "description"}


def from_lm_eval(
    source: str | Path | Json, *, model: Model | None = None, where: Where = EVERY_TOKEN, strength: float = 1.0
) -> Controller:
    """The steering of lm-eval's `steered` model.

        x <- x + s c v                            action "add", at the output of the module, at every token
        x <- x + (c - <d, x - b>) d,  d = v/|v|   action "clamp"

    with the vector v, the coefficient c, the bias b and s = `strength`.

    Args:
        source: A `.pt` file (tensors and plain values only, see `read_torch`; lm-eval itself runs whatever is in such
            a file), or the dictionary.
        model: Needed for modules inside a block, see `to_lm_eval`.
        where: Token positions, see `Loop`.
        strength: Factor, no unit; 0 is off. A clamp has no other strength than 1 in lm-eval.

    Raises:
        OSError: no such file.
        ValueError: anything else: a file that `read_torch` refuses, lm-eval's CSV of features, which holds no vectors,
            an entry of another form, a module that is no point of steerlens, an entry for one head (no module of
            Hugging Face has heads in its output).

    Source: lm-eval 0.4.13, `lm_eval/models/hf_steered.py`.
    """
    if isinstance(source, (str, Path)) and Path(source).suffix.lower() == ".csv":
        raise ValueError(
            f"{source} names features of autoencoders, which lm-eval fetches from the Hub; load the autoencoder and "
            "add its decoder's row: sl.add(sae.W_dec[index], layer=..., strength=coefficient)"
        )
    held = read_torch(source) if isinstance(source, (str, Path)) else source
    if not isinstance(held, Mapping) or not held:
        raise ValueError(f"{FORM} takes a dictionary of hook points, this is a {type(held).__name__}")
    names, loops = Names(model, FORM), []
    for path, entry in held.items():
        if not isinstance(path, str) or not isinstance(entry, Mapping):
            raise ValueError(f"{str(path)[:80]!r} has no entry with a steering_vector; this is no file of {FORM}")
        loops.append(_loop(names, path, entry).replace(where=where, name="lm_eval"))
    loops = [loop.replace(strength=loop.strength * strength) for loop in loops]
    return Controller(sorted(loops, key=lambda loop: loop.act), _recipe(source, strength))


def to_lm_eval(controller: Controller, path: str | Path, *, model: Model | None = None) -> None:
    """Write a controller for lm-eval: `lm_eval --model steered --model_args pretrained=...,steer_path=FILE`.

    lm-eval steers every token, padding too. It computes in the model's dtype, steerlens in float32: in a 16-bit model
    the two differ by its rounding.

    Args:
        controller: Adds constant vectors, or sets the projection on a direction to a level, at every token, one loop at
            a place.
        path: Where to write it, a name in `.pt`.
        model: From which the modules' paths are read, a TransformerBridge, nnsight or Hugging Face model. Without it
            blocks are called `layers.5`, as in Llama, Qwen, Mistral and Gemma, and other points cannot be named.

    Raises:
        OSError: it cannot be written there.
        ValueError: a loop that lm-eval cannot express, by name.
    """
    names = Names(model, FORM)
    found: dict[str, dict[str, Any]] = {}
    for loop in plain_loops(controller, FORM):
        need_every_token(loop, FORM)
        place = names.path_of(loop.act)
        level = clamped(loop) if loop.sense == loop.act else None
        new = _entry(*level, "clamp") if level else _entry(added(loop, FORM), 1.0, "add")
        before = found.get(place)
        if before is not None:
            if {before["action"], new["action"]} != {"add"}:
                refuse(loop, f"is the second one there, and {FORM} has one action for each place")
            new["steering_vector"] = before["steering_vector"] + new["steering_vector"]
        found[place] = new
    write_torch(path, found)


def _entry(vector: Tensor, coefficient: float, action: str) -> dict[str, Any]:
    found = {"steering_vector": vector.clone(), "steering_coefficient": coefficient, "action": action}
    return found | {"bias": None, "head_index": None}


def _loop(names: Names, path: str, entry: Mapping[str, Any]) -> Loop:
    """One entry."""
    site, vector, bias = names.site_of(path), entry.get("steering_vector"), entry.get("bias")
    unknown = sorted(str(key) for key in set(entry) - _KEYS)
    action = entry.get("action")
    if unknown or action not in ("add", "clamp"):
        what = (
            f"the unknown key {unknown[0][:60]!r}" if unknown else f"action={str(action)[:60]!r}, not 'add' or 'clamp'"
        )
        raise ValueError(f"{path!r} has {what}")
    if entry.get("head_index") is not None:
        raise ValueError(f"{path!r} has a head_index, but no module of Hugging Face has heads in its output")
    for name, tensor in (("steering_vector", vector), *((("bias", bias),) if bias is not None else ())):
        if not isinstance(tensor, Tensor) or tensor.ndim != 1 or not tensor.numel() or not tensor.is_floating_point():
            raise ValueError(f"{path!r} has a {name} that is no tensor [d] of real numbers")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{path!r} has a {name} that is not finite")
    try:
        coefficient = finite("steering_coefficient", entry.get("steering_coefficient", 1.0))
    except TypeError as error:
        raise ValueError(f"{path!r}: {error}") from None
    vector = vector.detach().clone()  # type: ignore[union-attr]
    if action == "add":
        if bias is not None:
            raise ValueError(f"{path!r} has a bias, which 'add' does not use")
        return Loop(Add(vector), site, strength=coefficient)
    length = vector.norm()
    if not length > 0 or (bias is not None and bias.shape != vector.shape):
        raise ValueError(f"{path!r} clamps to a direction of length zero, or has a bias of another length")
    direction = vector / length
    # the projection of x - b is to be c, so that of x is to be c + <d, b>
    reference = coefficient * direction + (bias.detach().to(direction) if bias is not None else 0.0)
    return Loop(Project(direction[None], reference), site)


def _recipe(source: Any, strength: float) -> dict[str, Any]:
    file = {"file": Path(source).name} if isinstance(source, (str, Path)) else {}
    return {"method": "from_lm_eval", "arguments": file | {"strength": float(strength)}}
