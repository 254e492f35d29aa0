"""Vectors trained through the model, by the gradient of a loss on completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steerlens.core import Loop, Pass, Site
from steerlens.core.progress import bar
from steerlens.fit.objectives import Labelled, Objective, Preference
from steerlens.fit.steered import acting
from steerlens.hosts import Host
from steerlens.hosts.batches import pad_rows
from steerlens.laws.feedback import Add

#: Steps between two looks at the held-out examples, and looks without a gain after which training stops.
EVERY, PATIENCE = 5, 4


@dataclass(frozen=True)
class Trained:
    """What training found.

    Attributes:
        vectors: One for each site, `[d]`, of the asked norms.
        step: The step at which the held-out loss was least; these are its vectors.
        before, after: Mean held-out loss without a vector and with them.
    """

    vectors: list[Tensor]
    step: int
    before: float
    after: float


class Training:
    """Adam on the directions of added vectors whose norms are fixed.

        v = n w / |w|,   w <- Adam(dL/dw)

    Args:
        host: Of the model; its weights are here.
        texts: All examples; with a loss of two sides the texts of a pair are neighbours, chosen first.
        aim: The loss.
        sites: Where a vector is added, to each token from the one that predicts the first label on.
        norms: |v| at each site, in activation units.
        rate: Of Adam, for w that begins as a unit vector.
        batch: Examples in one step.
    """

    def __init__(
        self,
        host: Host,
        texts: Sequence[Labelled],
        aim: Objective | Preference,
        sites: Sequence[Site],
        norms: Sequence[float],
        *,
        rate: float,
        batch: int,
    ):
        per = 2 if aim.sides == "both" else 1
        self.host, self.aim, self.sites, self.norms, self.rate, self.batch = host, aim, sites, norms, rate, batch
        self.examples = [texts[start : start + per] for start in range(0, len(texts), per)]

    def losses(self, vectors: Sequence[Tensor], chosen: Sequence[int]) -> Tensor:
        """Losses of some examples while the vectors act, `[example]`, with a graph if a vector requires one.

        Raises:
            ValueError: the model is being steered.
        """
        texts = [text for index in chosen for text in self.examples[index]]
        ids, mask = pad_rows([text.tokens for text in texts], self.host.device)
        starts = torch.tensor([text.start - 1 for text in texts])
        where = (torch.arange(ids.shape[1]) >= starts[:, None]) & mask.bool().cpu()
        graph = any(v.requires_grad for v in vectors)

        def logits(sign: int) -> Tensor:
            loops = [Loop(Add(sign * v), site, where=where) for v, site in zip(vectors, self.sites, strict=True)]
            with acting(self.host, Pass(loops, record=None)), torch.set_grad_enabled(graph and sign != 0):
                return (self.host.logits_with_graph if graph and sign else self.host.logits)(ids, mask)

        with torch.set_grad_enabled(graph):
            if isinstance(self.aim, Preference):
                return self.aim(logits(0), logits(1), logits(-1), texts)
            return self.aim(logits(1), texts)

    def mean(self, vectors: Sequence[Tensor], chosen: Sequence[int]) -> float:
        """Mean loss of some examples, without a graph."""
        parts = [chosen[start : start + self.batch] for start in range(0, len(chosen), self.batch)]
        return float(torch.cat([self.losses(vectors, part) for part in parts]).double().mean())

    def run(self, held_out: float, steps: int, seed: int) -> Trained:
        """Train on some of the examples, and keep the vectors with the least loss on the others.

        Raises:
            NotImplementedError: the model's weights are not on this machine.
            ValueError: the model is being steered; a loss without a gradient, or one that is not finite.
        """
        draw = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.examples), generator=draw).tolist()
        count = min(max(round(held_out * len(order)), 1), len(order) - 1)
        held, train = sorted(order[:count]), order[count:]
        zero = [torch.zeros(self.host.shape(site), dtype=torch.float32) for site in self.sites]
        # from the direction in which the loss of all training examples falls fastest
        ws = [-slope / slope.norm() for slope in self._slopes(zero, train)]
        begun = [v.detach() for v in self._of(ws)]
        before = self.mean(zero, held)
        found = Trained(begun, 0, before, self.mean(begun, held))
        for w in ws:
            w.requires_grad_()
        adam, waited = torch.optim.Adam(ws, lr=self.rate), 0
        for step in bar(range(1, steps + 1), desc="training"):
            picked = [train[i] for i in torch.randperm(len(train), generator=draw)[: self.batch].tolist()]
            with torch.enable_grad():
                slopes = torch.autograd.grad(self.losses(self._of(ws), picked).mean(), ws)
            for w, slope in zip(ws, slopes, strict=True):
                w.grad = slope
            adam.step()
            if step % EVERY and step < steps:
                continue
            vectors = [v.detach() for v in self._of(ws)]
            loss = self.mean(vectors, held)
            found, waited = (Trained(vectors, step, before, loss), 0) if loss < found.after else (found, waited + 1)
            if waited == PATIENCE:
                break
        return found

    def _of(self, ws: Sequence[Tensor]) -> list[Tensor]:
        return [norm * w / w.norm() for w, norm in zip(ws, self.norms, strict=True)]

    def _slopes(self, zero: Sequence[Tensor], train: Sequence[int]) -> list[Tensor]:
        """The gradient of the mean training loss at no control, one for each site."""
        leaves = [v.clone().requires_grad_() for v in zero]
        total = [torch.zeros_like(v) for v in zero]
        for start in range(0, len(train), self.batch):
            losses = self.losses(leaves, train[start : start + self.batch])
            for sum_, part in zip(total, torch.autograd.grad(losses.sum(), leaves), strict=True):
                sum_ += part
        for site, slope in zip(self.sites, total, strict=True):
            if not (torch.isfinite(slope).all() and slope.norm() > 0):
                raise ValueError(
                    f"the loss has no finite gradient at {site}; do its labels depend on what comes before?"
                )
        return total
