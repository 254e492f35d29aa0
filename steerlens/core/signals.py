"""Names under which a loop's signals appear in the activation cache and in the record."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from steerlens.core.law import Loop, Signals, free
from steerlens.core.sites import Site

#: Signals of every loop: the control in the model's dtype, and its Euclidean norm over all but batch and position.
COMMON = ("u", "u_norm")
#: Signals that have a total over the loops of one site; of the others only each loop's own value is meaningful.
TOTALS = ("u", "u_norm", "error")


class SiteSignals:
    """Hook names of the loops that act at one site, as `blocks.5.hook_steer_u`, so that `cache["steer_u", 5]` works.

    A lone loop has the plain names. Several loops have names of their own (`hook_steer_caa_u`), and the plain name is
    their total: the sum for `u`, its norm for `u_norm`, the root of the summed squares for `error`. Where one layer has
    loops at several points, the point comes first: `hook_steer_attn_out_u`.

    Attributes:
        own: One `{signal: hook name}` per loop.
        total: `{signal: hook name}`, empty for a lone loop.
    """

    def __init__(self, site: Site, loops: Sequence[Loop], *, crowded: bool, run: str = ""):
        stem = f"blocks.{site.layer}.hook_steer_" + (f"{run}_" if run else "") + (f"{site.point}_" if crowded else "")
        self.own: list[dict[str, str]] = []
        self.total: dict[str, str] = {}
        taken: set[str] = set()
        for loop in loops:
            names = [*COMMON, *loop.signals]
            if len(loops) == 1:
                self.own.append({name: stem + name for name in names})
                continue
            prefix = free(loop.name, taken)
            self.own.append({name: f"{stem}{prefix}_{name}" for name in names})
            self.total.update({name: stem + name for name in names if name in TOTALS})

    def names(self) -> list[str]:
        """All hook names of this site."""
        return [name for table in (*self.own, self.total) for name in table.values()]


def name_signals(loops: Sequence[Loop], run: str = "") -> dict[Site, SiteSignals]:
    """The names of all signals, by acting site. `run` keeps two controllers attached at once apart."""
    sites = sorted({loop.act for loop in loops})
    layers = [site.layer for site in sites]
    return {
        site: SiteSignals(
            site,
            [loop for loop in loops if loop.act == site],
            crowded=layers.count(site.layer) > 1,
            run=run,
        )
        for site in sites
    }


def gated(signals: Signals, decided: Tensor, measured: dict[str, Tensor], shape: Any) -> Signals:
    """The signals of a loop with a gate: the product of all gates, and what this one measured, row by row or token."""
    before = signals.get("gate")

    def product() -> Tensor:
        gate = decided.expand(shape)
        return gate if before is None else gate * before()

    rows = {name: partial(_rows, value, shape, decided.device) for name, value in measured.items()}
    return {**signals, **rows, "gate": product}


def _rows(value: Tensor, shape: Any, device: Any) -> Tensor:
    """`[batch]` at every token, `[batch pos]`; what each token has stays as it is."""
    value = value.to(device)
    return (value[:, None] if value.ndim == 1 else value).expand(shape)
