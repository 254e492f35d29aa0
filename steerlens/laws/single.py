"""Controllers of one law, made without a fit: add a vector, project a direction out, observe a setpoint."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from steerlens.core import Controller, Law, Loop, Now, Setpoint, Signals, Site
from steerlens.core.types import Place, Where
from steerlens.laws.feedback import Add, Project


class Observe(Law):
    """Do nothing, and report what a setpoint measures: `u = 0`.

    Args:
        setpoint: What measures.

    Signals: those of the setpoint.
    """

    def __init__(self, setpoint: Setpoint):
        self.setpoint = setpoint

    @property
    def signals(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of the setpoint."""
        return self.setpoint.signals

    def act(self, x: Tensor, now: Now) -> tuple[Tensor, Signals]:
        """`u = 0`"""
        return torch.zeros_like(x), self.setpoint.measure(x)[1]


def add(
    vector: Tensor | Sequence[float],
    *,
    layer: int | Sequence[int],
    point: str = "resid_post",
    where: Where = "last",
    strength: float = 1.0,
) -> Controller:
    """Add a steering vector of your own to the residual stream, or at another point of a block.

        x <- x + strength v

        with sl.steer(model, sl.add(vector, layer=12)): ...

    Args:
        vector: v, `[d]` in activation units; at the point `z` `[head d_head]`. Several layers get the same vector.
        layer: Where it acts, counted from 0; one layer or several.
        point: A point of `Site`.
        where: Token positions, see `Loop`.
        strength: Factor, no unit; 0 is off.

    Raises:
        TypeError: a vector that holds no numbers.
        ValueError: a vector that is empty, not finite, or of another shape; no layer. A wrong width is reported by
            `steer`.
    """
    kept = _rows("vector", vector, point)
    law = Add(kept)
    loops = [Loop(law, site, where=where, strength=strength, name="add") for site in _sites(layer, point)]
    return Controller(loops, {"method": "add", "arguments": {"point": point, "strength": float(strength)}})


def project_out(
    direction: Tensor | Sequence[float],
    *,
    layer: int | Sequence[int],
    point: str = "resid_post",
    where: Where = "all",
    strength: float = 1.0,
) -> Controller:
    """Remove a direction, or the span of several, from the state: directional ablation.

        x <- x - strength B' B x

    with B an orthonormal basis of the directions. `ablation` finds a direction in contrast texts and removes it at
    every point that writes to the residual stream.

    Args:
        direction: `[d]`, or several `[m d]`; their lengths do not matter.
        layer: Where it acts, counted from 0; one layer or several.
        point: A point of `Site` with states `[d]`: every point but `z`.
        where: Token positions, see `Loop`.
        strength: Factor, no unit; 1 removes the direction, 2 reflects the state, 0 is off.

    Returns:
        A loop for each layer. Recorded signals: `projection` `[batch pos]`, the norm of what is removed, in activation
        units; `u`; `u_norm`.

    Raises:
        TypeError: a direction that holds no numbers.
        ValueError: zero, or directions that are linearly dependent; no layer; the point `z`.
    """
    if point == "z":
        raise ValueError("project_out() has no point 'z', whose states are one vector for each head; use 'attn_out'")
    rows = _rows("direction", direction, "z")
    rows = rows[None] if rows.ndim == 1 else rows
    # in float64, so that the basis is orthonormal to the last digit of float32
    _, spread, basis = torch.linalg.svd(rows.double(), full_matrices=False)
    if not len(rows) or float(spread.min()) <= 1e-6 * float(rows.double().norm(dim=-1).max()):
        raise ValueError("direction is zero, or several directions are linearly dependent; give independent ones")
    law = Project(basis.to(rows), torch.zeros_like(rows[0]))
    loops = [Loop(law, site, where=where, strength=strength, name="project_out") for site in _sites(layer, point)]
    return Controller(loops, {"method": "project_out", "arguments": {"point": point, "strength": float(strength)}})


def observe(setpoint: Setpoint, site: Place, *, where: Where = "all", name: str = "observe") -> Controller:
    """Measure with a setpoint and do nothing: `u = 0`.

        with sl.steer(model, sl.caa(model, pairs) + sl.observe(sl.Level(direction, 3.0), 20)) as run: ...

    Composed after a controller at the same site it measures what the controller has reached, under the loop's name:
    `blocks.20.hook_steer_observe_error`.

    Args:
        setpoint: What measures; the level it holds enters the signal `error` alone.
        site: A `Site`, a hook name, or a layer for its `resid_post`.
        where: Token positions, see `Loop`.
        name: Of the loop.

    Returns:
        One loop. Recorded signals: those of the setpoint.

    Raises:
        TypeError: not a setpoint.
    """
    if not isinstance(setpoint, Setpoint):
        raise TypeError(f"observe() takes a setpoint, it got a {type(setpoint).__name__}; make one: sl.Level(v, 3)")
    return Controller([Loop(Observe(setpoint), site, where=where, name=name)], {"method": "observe"})


def _rows(name: str, given: Any, point: str) -> Tensor:
    """One vector, or the rows of a matrix if the point has heads."""
    if isinstance(given, (str, bytes)):
        raise TypeError(f"{name} is a {type(given).__name__}; give a tensor or numbers")
    try:
        found = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} is a {type(given).__name__} that holds no numbers; give a tensor [d]") from error
    if found.is_complex() or found.dtype == torch.bool:
        raise TypeError(f"{name} is a tensor of {found.dtype}; give real numbers")
    if not found.is_floating_point():
        found = found.float()
    if found.ndim not in ((1, 2) if point == "z" else (1,)) or not found.numel():
        raise ValueError(f"{name} has shape {list(found.shape)}; give [d]" + (" or rows" if point == "z" else ""))
    if not bool(torch.isfinite(found).all()):
        raise ValueError(f"{name} is not finite")
    return found.detach().clone()


def _sites(layer: int | Sequence[int], point: str) -> list[Site]:
    layers: list[int] = list(layer) if isinstance(layer, Iterable) else [layer]
    if not layers:
        raise ValueError("layer is empty; give one layer or several")
    sites = [Site(each, point) for each in layers]
    if len(set(sites)) < len(sites):
        raise ValueError(f"layer={layers} names a layer twice")
    return sites
