"""Intervention specs of TransformerLens 4, for models that run elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steerlens.core import Controller, Loop, Site
from steerlens.core.types import Json
from steerlens.sharing.plain import added, every_token, plain_loops, refuse

FORM = "an intervention spec"
#: TransformerLens 4's own names of our points; `resid_mid` is read-only there.
_NAMES = {
    "resid_pre": "hook_in",
    "z": "attn.hook_z",
    "attn_out": "attn.hook_out",
    "mlp_out": "mlp.hook_out",
    "resid_post": "hook_out",
}
#: Longest list of positions.
MOST_POSITIONS = 4096


def to_interventions(controller: Controller) -> dict[str, Json]:
    """A controller as TransformerLens 4's intervention specs, for models that a server runs.

        logits = bridge(tokens, intervene=steerlens.sharing.to_interventions(controller))

    {"blocks.5.hook_out": {"op": "add", "value": [...], "pos": [1, 2]}}: plain JSON, so that it can be sent. Positions
    are those of one forward pass. `pos` is missing if every token is steered.

    Args:
        controller: Adds constant vectors, at every token or in a slice with two bounds that are not negative; loops
            at one place add up.

    Raises:
        ValueError: a loop that a spec cannot express, by name: another law, tokens that depend on the prompt's length,
            a gate, `resid_mid` or `mlp_post`.

    Source: transformer-lens 4, `model_bridge/sources/inspect/intervention.py` and `sources/vllm/intervention_specs.py`.
    The vLLM source takes one vector a hook point, not one for each position.
    """
    found: dict[Site, dict[int | None, Tensor]] = {}
    for loop in sorted(plain_loops(controller, FORM), key=lambda loop: loop.act):
        if loop.act.point not in _NAMES:
            refuse(loop, f"acts where {FORM} cannot write; the points are {', '.join(_NAMES)}")
        vector = added(loop, FORM).flatten()
        at = found.setdefault(loop.act, {})
        for position in _positions(loop):
            at[position] = at[position] + vector if position in at else vector
    return {f"blocks.{site.layer}.{_NAMES[site.point]}": _spec(site, at) for site, at in found.items()}


def _positions(loop: Loop) -> list[int] | list[None]:
    if every_token(loop):
        return [None]
    where = loop.where
    start, stop = (where.start or 0, where.stop) if isinstance(where, slice) else (0, None)
    if stop is None or start < 0 or stop < 0 or not 0 < stop - start <= MOST_POSITIONS:
        shown = "the tokens of a mask" if isinstance(where, Tensor) else f"the tokens {where!r}"
        refuse(
            loop,
            f"steers {shown}, which depend on the prompt; {FORM} has every token, controller.at(slice(0, None)), or a "
            f"slice of at most {MOST_POSITIONS} positions",
        )
    return list(range(start, stop))


def _spec(site: Site, at: dict[int | None, Tensor]) -> dict[str, Any]:
    """One hook point's spec."""
    everywhere = at.pop(None, None)
    if everywhere is not None:
        if at:
            raise ValueError(f"one loop at {site} steers every token and another one some; {FORM} has one `pos`")
        return {"op": "add", "value": everywhere.tolist()}
    rows = torch.stack([at[position] for position in sorted(at)])  # type: ignore[type-var]
    same = bool((rows == rows[0]).all())
    return {"op": "add", "value": (rows[0] if same else rows).tolist(), "pos": sorted(at)}
