"""A controller as plain hook functions, for `run_with_hooks`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from steerlens.core.law import Loop
from steerlens.core.passing import Pass
from steerlens.core.sites import Site
from steerlens.core.span import Span

#: A hook function of TransformerLens.
Hook = Callable[..., Tensor]


def forward_hooks(loops: Sequence[Loop]) -> list[tuple[str, Hook]]:
    """Hook names and functions, see `Controller.fwd_hooks`."""
    for loop in loops:
        if loop.act.point == "resid_mid":
            raise ValueError(
                f"a TransformerBridge ignores what a hook writes at {loop.act}; use steer(), which adds it elsewhere"
            )
        if isinstance(loop.where, Span):
            raise ValueError(f"where={loop.where} goes by the tokens, which a hook does not see; use steer()")
        if loop.needs_more_than_state:
            raise ValueError(
                f"the loop at {loop.act} needs a second pass over the text, which hooks cannot run; use steer()"
            )
    run = Pass(loops, record=None)
    first = run.sites[0] if run.sites else None
    return [(str(site), partial(_hook, run, site, site == first)) for site in run.sites]


def _hook(run: Pass, site: Site, first: bool, x: Tensor, hook: Any = None) -> Tensor:
    if first:
        run.begin((x.shape[0], x.shape[1]), device=x.device)
    return run.at(site, x)
