"""Adapters to the model libraries. A library is asked only if the user has imported it already."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from steerlens.hosts.base import Attachment, Host
from steerlens.hosts.nominal import Nominal

__all__ = ["Attachment", "Host", "Nominal", "host_of", "remote"]

#: Library -> the host module that knows it; the only place where they are listed.
_HOSTS = {"transformer_lens": "steerlens.hosts.lens", "nnsight": "steerlens.hosts.traced"}


def remote(model: Any, server: bool | str = True) -> Host:
    """An nnsight model whose activations are read on a server, for fitting: `caa(remote(lm), pairs)`.

    Pooled on the server: what comes back is one vector per text and site.

    Args:
        model: An nnsight `TransformersModel` or `LanguageModel`; its weights may stay on the server.
        server: True for the configured NDIF host, or a URL.

    Raises:
        TypeError: the model is not nnsight's.
    """
    host = host_of(model)
    if host.library != "nnsight":
        raise TypeError(f"only nnsight models run remotely; this is a {type(model).__name__}")
    return type(host)(model, remote=server)  # type: ignore[call-arg]


def host_of(model: Any) -> Host:
    """The adapter for a model.

    Raises:
        TypeError: no library that steerlens knows and the user has imported has made this model.
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
