"""Features of sparse autoencoders as setpoints: hold them, observe them, find them."""

from __future__ import annotations

from steerlens.sae.feature import Target, feature, hold, observe
from steerlens.sae.reading import Description, describe, rank_features
from steerlens.sae.setpoint import Feature

__all__ = [
    "Description",
    "Feature",
    "Target",
    "describe",
    "feature",
    "hold",
    "observe",
    "rank_features",
]
