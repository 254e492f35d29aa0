"""Adapters to the model libraries. A library is asked only if the user has imported it already."""

from __future__ import annotations

import importlib
import sys

from steerlens.hosts.attachment import Attachment
from steerlens.hosts.base import Host, UntrustedError
from steerlens.hosts.blocks.nominal import Nominal
from steerlens.hosts.dimensions import Dimensions
from steerlens.hosts.types import Model

__all__ = ["Attachment", "Dimensions", "Host", "Nominal", "UntrustedError", "host_of", "remote"]

#: Library -> the host module that knows it; the only place where they are listed.
_HOSTS = {"transformer_lens": "steerlens.hosts.lens.models", "nnsight": "steerlens.hosts.traced.model"}


def remote(model: Model, server: bool | str = True, *, timeout_s: float = 3600.0) -> Host:
    """An nnsight model whose activations and gradients are taken on a server, for fitting: `caa(remote(lm), pairs)`.

    Pooled on the server: what comes back is one vector per text and site. Gradients need a server that trusts you.

    Args:
        model: An nnsight `TransformersModel` or `LanguageModel`; its weights may stay on the server.
        server: True for the configured NDIF host, or a URL.
        timeout_s: Longest wait for one batch of texts, the server's queue included.

    Raises:
        TypeError: the model is not nnsight's.
    """
    host = host_of(model)
    if host.library != "nnsight":
        raise TypeError(f"only nnsight models run remotely; this is a {type(model).__name__}")
    return type(host)(model, remote=server, timeout_s=timeout_s)  # type: ignore[call-arg]


def host_of(model: Model) -> Host:
    """The adapter for a model.

    Raises:
        TypeError: the model belongs to no library that steerlens supports and that is imported.
    """
    if isinstance(model, Host):
        return model
    for library, module in _HOSTS.items():
        if library in sys.modules:
            host = importlib.import_module(module).claim(model)
            if host is not None:
                return host
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    raise TypeError(
        f"cannot steer a {kind}; wrap it as transformer_lens.model_bridge.TransformerBridge, HookedTransformer "
        "(TransformerLens 3) or nnsight.TransformersModel"
    )
