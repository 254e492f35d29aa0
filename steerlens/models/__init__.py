"""Real small models that need no internet, and a tiny random one, each as any host."""

from __future__ import annotations

from steerlens.models.real import gemma3, smollm2
from steerlens.models.tiny import tiny

__all__ = ["gemma3", "smollm2", "tiny"]
