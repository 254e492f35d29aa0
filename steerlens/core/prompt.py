"""What a loop may know of the prompt, and what may scale its control: summaries, gates, schedules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steerlens.core.part import Part
from steerlens.core.positions import check_where
from steerlens.core.sites import Site
from steerlens.core.types import Where

POOLS = ("mean", "rms")


class Summary(Part):
    """The unsteered state of a prompt at one site, pooled over its tokens and kept for the whole sequence.

        mean: (1/n) sum_t x_t        rms: sqrt((1/n) sum_t x_t^2), element by element

    Unsteered: if a loop of the same run acts before the site, or another run is attached, the state comes from an
    additional, unsteered pass over the prompt. If a prompt has none of the tokens that `where` selects, its summary
    is zero; so it is for a prompt of one token, since position 0 is left out.

    Args:
        site: Where the state is.
        pool: `"mean"` or `"rms"`.
        where: Tokens of the prompt, see `Loop`; with `"last_prompt"` the mean is the state of its last token.
    """

    place: str
    pool: str
    where: Where

    def __init__(self, site: Site | str, pool: str = "mean", where: Where = "prompt"):
        # a part holds plain values only
        self.place = str(site)
        self.pool = pool
        self.where = where
        self.validate()

    def validate(self) -> None:
        """Site, pool and positions are legal."""
        Site.parse(self.place)
        if self.pool not in POOLS:
            raise ValueError(f"pool={self.pool!r}; it is one of {', '.join(POOLS)}")
        check_where(self.where)

    @property
    def site(self) -> Site:
        """Where the state is."""
        return Site.parse(self.place)

    def of(self, x: Tensor, selection: slice | Tensor | None) -> Tensor:
        """The pooled state, `[batch pos ...] -> [batch ...]`, in float32 at least."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if selection is None:
            return torch.zeros_like(x[:, 0])
        if isinstance(selection, slice):
            x = x[:, selection]
            count: Any = x.shape[1]
        else:
            # a pad may hold anything, also NaN
            x = torch.where(selection.view(*x.shape[:2], *[1] * (x.ndim - 2)), x, 0.0)
            count = selection.sum(1).clamp(min=1).view(-1, *[1] * (x.ndim - 2))
        return x.sum(1) / count if self.pool == "mean" else (x.square().sum(1) / count).sqrt()


class Condition(Part):
    """Abstract: decides from a summary of the prompt, row by row, whether or how strongly to steer.

    A subclass is final, holds tensors and numbers only, and defines `decide`.

    Attributes:
        signals: Names of the signals that `decide` returns in addition to the gate.
    """

    signals: tuple[str, ...] = ()

    def decide(self, pooled: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The gate, usually 0 to 1, and signals: one `[batch ...]` per summary `-> [batch], {name: [batch]}`."""
        raise NotImplementedError


class Gate(Part):
    """A condition and the summaries it reads. Its decision multiplies the controls of a loop for the whole sequence.

    Args:
        condition: Decides.
        summaries: What it reads, in its order.
        inverted: Open if the condition is not met: 1 minus its decision.
        each_token: It decides anew for each token, from the token's own state in the steered pass instead of the pooled
            prompt; the tokens that a summary names count for nothing then.
    """

    # files of before have none
    each_token: bool = False

    def __init__(
        self, condition: Condition, summaries: Sequence[Summary], inverted: bool = False, each_token: bool = False
    ):
        self.condition = condition
        self.summaries = tuple(summaries)
        self.inverted = inverted
        self.each_token = each_token

    def __invert__(self) -> Gate:
        return Gate(self.condition, self.summaries, not self.inverted, self.each_token)

    @property
    def sites(self) -> list[Site]:
        """Where it reads states, summary by summary."""
        return [summary.site for summary in self.summaries]

    def of_each_token(self) -> Gate:
        """The same gate, deciding for each token."""
        return Gate(self.condition, self.summaries, self.inverted, True)

    def factors(self, states: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Decisions about tokens by themselves: one `[batch pos ...]` per summary `-> [batch pos], {name: same}`."""
        shape = states[0].shape[:2]
        # a token is a prompt of one token
        alone = [x.reshape(-1, 1, *x.shape[2:]) for x in states]
        pooled = [summary.of(x, slice(None)) for summary, x in zip(self.summaries, alone, strict=True)]
        decided, signals = self.decide(pooled)
        return decided.view(shape), {name: value.view(shape) for name, value in signals.items()}

    def decide(self, pooled: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The condition's decision, inverted if the gate is."""
        opened, signals = self.condition.decide(pooled)
        return (1 - opened if self.inverted else opened), signals


class Schedule(Part):
    """Factors on a control over the tokens of a generation.

    Args:
        factors: `[step]`; the i-th is used in the pass that produces generated token i, at the last token of the prompt
            for i = 0. The last one holds from then on.
        prompt: Factor at the tokens of the prompt before its last.
    """

    def __init__(self, factors: Tensor, prompt: float = 1.0):
        self.factors = factors
        self.prompt = prompt
        self.validate()

    def validate(self) -> None:
        """There is at least one factor."""
        if self.factors.ndim != 1 or not len(self.factors):
            raise ValueError(f"factors has shape {list(self.factors.shape)}; give at least one number, [step]")

    def at(self, steps: Tensor) -> Tensor:
        """Factors of tokens that are `steps` after the last prompt token, `[batch pos] -> [batch pos]`."""
        later = self.factors[steps.clamp(0, self.factors.shape[0] - 1)]
        return torch.where(steps < 0, torch.full_like(later, self.prompt), later)


class Direction(Part):
    """A direction in the space of a model's parameters.

    Args:
        names: Of the parameters, as the Hugging Face base model names them.
        values: One tensor per name, of the parameter's shape.
        step: Of a central difference, in multiples of the direction; 0: forward-mode differentiation.
    """

    def __init__(self, names: Sequence[str], values: Sequence[Tensor], step: float = 0.0):
        self.names = list(names)
        self.values = list(values)
        self.step = step
