"""The model of a command: its options, and how it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any

import typer

from steerlens import models
from steerlens.hosts.lens.named import bridge, hooked
from steerlens.hosts.traced.named import language_model

#: Models by a short name.
SHIPPED = ("smollm2", "gemma3", "tiny")


class Library(StrEnum):
    """What loads a model: TransformerBridge, HookedTransformer, or nnsight's model class."""

    bridge = "bridge"
    hooked = "hooked"
    nnsight = "nnsight"


_BY_NAME: dict[Library, Callable[[str], Any]] = {
    Library.bridge: bridge,
    Library.hooked: hooked,
    Library.nnsight: language_model,
}

NAMES = "smollm2, gemma3, tiny, a folder, or a name on the Hugging Face Hub."
MODEL = typer.Option("smollm2", help=NAMES)
HOST = typer.Option(Library.bridge, help="The library that runs the model; hooked needs TransformerLens 3.")


def load_model(name: str, host: Library = Library.bridge) -> Any:
    """A model by name: `smollm2`, `gemma3`, `tiny`, or a Hugging Face model, with its own weights on every host.

    Raises:
        ImportError: the library is not installed, or its version has no such model class.
        OSError: no such model here, and it cannot be fetched.
    """
    if name in SHIPPED:
        return getattr(models, name)(host=host.value)
    try:
        return _BY_NAME[host](name)
    except OSError as error:
        reason = str(error).partition(chr(10))[0]
        raise OSError(
            f"no model {name!r} was found: {reason} Without network there are {', '.join(SHIPPED)}, folders of "
            "models, and what the Hugging Face cache holds"
        ) from None


def optional_model(name: str | None, host: Library) -> Any:
    """As `load_model`; None for no name.

    Raises:
        ValueError: a library without a model.
    """
    if name is None and host is not Library.bridge:
        raise ValueError(f"--host {host.value} says what runs a model; name the model too: --model smollm2")
    return None if name is None else load_model(name, host)
