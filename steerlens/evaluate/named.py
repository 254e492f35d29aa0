"""A model and a controller by name and file, for harnesses that are started from a command line."""

from __future__ import annotations

from pathlib import Path

from steerlens.core import Controller
from steerlens.hosts import Host, host_of
from steerlens.hosts.lens.named import bridge
from steerlens.hosts.traced.named import language_model
from steerlens.hosts.types import Model

LIBRARIES = ("transformer_lens", "nnsight")


def open_host(model: Model, library: str = "transformer_lens") -> Host:
    """The host of a model; a model that is given by name is loaded first.

    Args:
        model: A model, a host, or the name or folder of a Hugging Face model.
        library: What loads a name: `"transformer_lens"` (as a TransformerBridge) or `"nnsight"`.
    """
    if library not in LIBRARIES:
        raise ValueError(f"library={library!r}; it is one of {', '.join(LIBRARIES)}")
    if not isinstance(model, str):
        return host_of(model)
    return host_of(bridge(model) if library == "transformer_lens" else language_model(model))


def open_controller(controller: Controller | str | Path | None) -> Controller | None:
    """A controller; one that is given by its file is loaded first, None steers nothing."""
    return Controller.load(controller) if isinstance(controller, (str, Path)) else controller
