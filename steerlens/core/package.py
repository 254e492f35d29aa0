"""What `import steerlens as sl` means inside a block that nnsight sends to a server."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class Ambassador:
    """Replaces steerlens on a server, which does not have it: any name but `apply` raises an error with advice.

    Args:
        apply: `steerlens.apply`, as it travels.
    """

    def __init__(self, apply: Any):
        self.apply = apply

    def __getattr__(self, name: str) -> Any:
        # unpickling asks for methods by such names before there is any state
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(
            f"a server has no steerlens.{name}: of the package a remote block can use `apply` only; import others by "
            f"name, from steerlens import {name}, or use them before the block"
        )


class Package(ModuleType):
    """The package as a value: nnsight would send every file of it, which no server could load."""

    def __dir__(self) -> list[str]:
        """The public names, and nothing that is only used inside."""
        return list(self.__all__)

    def __reduce__(self) -> tuple[Any, ...]:
        cloudpickle = sys.modules.get("cloudpickle")
        sent = cloudpickle is not None and self.__name__ in cloudpickle.list_registry_pickle_by_value()
        return (Ambassador, (self.apply,)) if sent else (importlib.import_module, (self.__name__,))
