"""Gradients of a training loss to the activations of its examples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steerlens.core import Site
from steerlens.core.progress import bar
from steerlens.fit.contrast import Pairs
from steerlens.fit.objectives import Labelled, Objective, labelled
from steerlens.hosts import Host


def example_gradients(
    host: Host, data: Pairs, aim: Objective, sites: Sequence[Site], *, rejected_only: bool = False, batch: int = 4
) -> tuple[dict[Site, Tensor], dict[Site, Tensor], int]:
    """Activation and loss gradient of each text before its first label token, and N.

    Returns:
        `{site: x [text d]}`, `{site: dL/dx [text d]}` and the number of examples; with two texts an example their rows
        are neighbours, chosen first.
    """
    texts = labelled(data, host, aim.sides)
    per = 2 if aim.sides == "both" else 1
    found: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for start in bar(range(0, len(texts), batch * per), desc="gradients"):
        chosen = texts[start : start + batch * per]

        def loss(logits: Tensor, chosen: list[Labelled] = chosen) -> Tensor:
            return aim(logits, chosen).sum()

        gradients = host.gradients(
            [text.tokens for text in chosen],
            [text.weights() for text in chosen],
            sites,
            loss,
        )
        for site, values in gradients.items():
            found[site].append(values)
    kept = [index for index in range(len(texts)) if not rejected_only or index % 2]
    read = host.read([texts[i].tokens for i in kept], [texts[i].weights() for i in kept], sites)
    rows = {site: torch.cat(values)[kept] for site, values in found.items()}
    for site, values in rows.items():
        if not torch.isfinite(values).all():
            raise ValueError(f"a gradient at {site} is not finite; is the model's dtype {host.dtype} too narrow?")
    return read, rows, len(texts) // per
