"""Real small models that need no internet, and a tiny random one, each as any host; features for one."""

from __future__ import annotations

from steerlens.models.autoencoder import smollm2_sae
from steerlens.models.real import gemma3, smollm2
from steerlens.models.tiny import tiny

__all__ = ["gemma3", "smollm2", "smollm2_sae", "tiny"]
