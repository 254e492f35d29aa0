"""Activations of texts under controls of one's own: what a fit needs that goes through the layers in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from steerlens.core import Law, Loop, Now, Pass, Signals, Site
from steerlens.fit.contrast import Reading
from steerlens.hosts import Host
from steerlens.hosts.batches import pad
from steerlens.hosts.steered import Steered

#: Texts per forward pass.
BATCH = 16


class Note(Law):
    """Do nothing, and report the state: `u = 0`.

    Signals: `state` `[batch pos d]`, in activation units.
    """

    signals = ("state",)
    vectors = ("state",)

    def act(self, x: Tensor, now: Now) -> tuple[Tensor, Signals]:
        """`u = 0`"""
        return torch.zeros_like(x), {"state": lambda: x}


@contextmanager
def acting(host: Host, run: Pass) -> Iterator[None]:
    """A context in which loops of the fit's own steer the model, and no others.

    Raises:
        ValueError: the model is being steered.
    """
    if Steered.of(host.model) is not None:
        raise ValueError("this fit runs the model under its own controls; remove the run that steers it first")
    attachment = host.attach(run, payload_limit=16 * 2**20, timeout_s=3600.0)
    try:
        yield
    finally:
        attachment.detach()


def steered_states(host: Host, texts: Reading, loops: Sequence[Loop], site: Site) -> Tensor:
    """Pooled activations of texts at a site while loops act before it, `[text d]`, in float64, on the CPU.

    Raises:
        ValueError: the model is being steered.
    """
    note = Loop(Note(), site, where=slice(0, None), name="note")
    run = Pass([*loops, note], record=["state"])
    rows = []
    with acting(host, run), torch.no_grad():
        for start in range(0, len(texts.tokens), BATCH):
            ids, mask, weights = pad(
                texts.tokens[start : start + BATCH], texts.weights[start : start + BATCH], host.device
            )
            host.logits(ids, mask)
            (state,) = [value for name, value in run.log.items() if "state" in str(name)]
            kept = torch.where(mask[..., None].bool().cpu(), state.cpu().double(), 0.0)
            rows.append((kept * weights.cpu().double()[..., None]).sum(1))
    return torch.cat(rows)
