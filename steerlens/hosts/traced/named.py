"""An nnsight model by name."""

from __future__ import annotations

from typing import Any


def language_model(name: str) -> Any:
    """nnsight's LanguageModel of a Hugging Face model, by its name or folder, with its weights here."""
    from nnsight import LanguageModel

    return LanguageModel(name, dispatch=True)
