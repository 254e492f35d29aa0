"""Does a controller help, and what did it break? Likelihoods and texts of a steered model."""

from __future__ import annotations

from steerlens.evaluate.scoring import log_probabilities, scored_logits
from steerlens.evaluate.texts import Generation, generate_texts

__all__ = ["Generation", "generate_texts", "log_probabilities", "scored_logits"]
