"""Files that the command line reads and writes, by their format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from steerlens.cli.layers import parse_layers
from steerlens.core import Controller
from steerlens.core.tensorfile import write_whole
from steerlens.sharing import (
    from_gguf,
    from_hidden_directions,
    from_lm_eval,
    from_tensor,
    read_torch,
    to_gguf,
    to_interventions,
    to_lm_eval,
)

#: Formats that are read and that are written, and those that the ending of a file name selects.
READ = ("steerlens", "gguf", "lm-eval", "hidden-directions", "tensors")
WRITTEN = ("steerlens", "gguf", "lm-eval", "interventions")
ENDINGS = {".safetensors": "steerlens", ".gguf": "gguf", ".pt": "lm-eval", ".pth": "lm-eval", ".json": "interventions"}


def read_controller(path: Path, *, form: str | None, layers: str | None, model: Any) -> tuple[str, Controller]:
    """The format and the controller of a file.

    Args:
        path: The file.
        form: One of `READ`; default what its name and content say.
        layers: Layers to use of it, as they are typed; None for all.
        model: Where a format needs one, see `steerlens.sharing`.

    Raises:
        OSError, ValueError: it cannot be read, or is refused.
    """
    if form is not None and form not in READ:
        raise ValueError(f"--from {form}: the formats that are read are {', '.join(READ)}")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    kind = form or _guess(path)
    chosen = None if layers is None else parse_layers(layers)
    if kind in ("steerlens", "lm-eval") and chosen is not None:
        return kind, _load(kind, path, model).only(chosen)
    if kind in ("steerlens", "lm-eval"):
        return kind, _load(kind, path, model)
    if kind == "gguf":
        return kind, from_gguf(path, layers=chosen)
    if kind == "hidden-directions":
        if chosen is None and path.is_file() and isinstance(read_torch(path), Tensor):
            raise ValueError(f"{path} has a vector for every layer; name the layers to use: --layers 15")
        return kind, from_hidden_directions(path, layers=chosen, model=model)
    held = read_torch(path)
    if not isinstance(held, (dict, Tensor)):
        raise ValueError(f"{path} holds a {type(held).__name__}, no vectors by layer")
    return kind, from_tensor(held, layers=chosen)


def write_controller(controller: Controller, path: Path, *, form: str | None, model: Any) -> str:
    """Write a controller and return the format.

    Raises:
        OSError, ValueError: it cannot be written there, or not in this format.
    """
    kind = form or ENDINGS.get(path.suffix)
    if kind not in WRITTEN:
        what = f"--to {form}" if form else f"the name {path.name} has no known ending; use --to"
        raise ValueError(f"{what}: the formats that are written are {', '.join(WRITTEN)}")
    writers: dict[str, Callable[[], None]] = {
        "steerlens": lambda: controller.save(path),
        "gguf": lambda: to_gguf(controller, path),
        "lm-eval": lambda: to_lm_eval(controller, path, model=model),
        "interventions": lambda: write_whole(path, [json.dumps(to_interventions(controller)).encode()]),
    }
    writers[kind]()
    return kind


def _load(kind: str, path: Path, model: Any) -> Controller:
    return Controller.load(path) if kind == "steerlens" else from_lm_eval(path, model=model)


def _guess(path: Path) -> str:
    """By the name; of a file of torch.save, by what is in it."""
    if path.is_dir():
        return "hidden-directions"
    kind = ENDINGS.get(path.suffix)
    if kind == "interventions":
        raise ValueError(f"{path} holds intervention specs, which are written, not read")
    if kind != "lm-eval":
        return kind or "steerlens"
    held = read_torch(path)
    if isinstance(held, Tensor) or (isinstance(held, dict) and "bias" in held and "layer" in held):
        return "hidden-directions"
    integers = isinstance(held, dict) and bool(held) and all(isinstance(key, int) for key in held)
    return "tensors" if integers else "lm-eval"
