"""Controllers from other libraries and for them: repeng, steering-vectors, llama.cpp, lm-eval, TransformerLens 4."""

from __future__ import annotations

from steerlens.sharing import hub  # noqa: F401 (enters itself in the table that Controller.push_to_hub reads)
from steerlens.sharing.gguf import from_gguf, to_gguf
from steerlens.sharing.interventions import to_interventions
from steerlens.sharing.lm_eval import from_lm_eval, to_lm_eval
from steerlens.sharing.torchfile import read_torch
from steerlens.sharing.vectors import from_hidden_directions, from_repeng, from_steering_vectors, from_tensor

__all__ = [
    "from_gguf",
    "from_hidden_directions",
    "from_lm_eval",
    "from_repeng",
    "from_steering_vectors",
    "from_tensor",
    "read_torch",
    "to_gguf",
    "to_interventions",
    "to_lm_eval",
]
