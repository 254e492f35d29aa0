"""Adapters to the model libraries. A library is asked only if the user has imported it already."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from steerlens.hosts.base import Attachment, Host
from steerlens.hosts.nominal import Nominal

__all__ = ["Attachment", "Host", "Nominal", "host_of"]

#: Library -> the host module that knows it; the only place where they are listed.
_HOSTS = {"transformer_lens": "steerlens.hosts.lens", "nnsight": "steerlens.hosts.traced"}


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
