"""What a host makes of a pass on a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from steerlens.core import Pass


class Attachment:
    """A pass that is attached to a model; `detach` takes it off and leaves nothing behind.

    Attributes:
        run: The pass.
        owner: What the user holds.
    """

    run: Pass
    owner: Any = None

    def ready(self) -> None:
        """A forward pass begins."""

    def strip(self, find: Callable[[Any], Any]) -> None:
        """Take what is of it off a deep copy of the model; `find` gives the copy of a part, or None."""

    @property
    def payload_bytes(self) -> int | None:
        """Size of the latest request to a server, on hosts that send any."""
        return None

    def detach(self) -> None:
        """Remove every hook and edit, also if an interrupt comes in between; calling it twice is harmless."""
        try:
            self._take_off()
        except BaseException:
            self._take_off()
            raise

    def _take_off(self) -> None:
        """Remove what is there of it; what a first call has left undone, a second one finishes."""
        raise NotImplementedError
