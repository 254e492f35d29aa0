"""When, and how strongly, a controller acts: `gate`, `when`, `schedule`, for every method alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from steerlens.core import PROMPT_ONLY, Condition, Controller, Gate, Schedule, Site, Summary, check_where
from steerlens.core.types import Layers, PositionName
from steerlens.fit.contrast import Pairs
from steerlens.fit.logistic import logistic
from steerlens.fit.reading import check_contrast, check_finite, check_option, every_layer
from steerlens.hosts import Host, host_of
from steerlens.hosts.types import Model
from steerlens.laws.conditions import Probability, Ramp, Side

#: How a prompt is pooled -> the tokens whose mean it is.
Pool: TypeAlias = Literal["mean", "last"]

#: The tokens that each names.
POOLS: dict[Pool, PositionName] = {"mean": "prompt", "last": "last_prompt"}

#: From score to strength: 0 or 1, a straight line between two bounds, the probability of a logistic probe.
Curve: TypeAlias = Literal["step", "linear", "logistic"]


def gate(
    model: Model,
    data: Pairs,
    *,
    gate_layers: Layers = None,
    point: str = "resid_post",
    pool: Pool = "mean",
    threshold: float | None = None,
    curve: Curve = "step",
    low: float | None = 0.0,
    high: float | None = 1.0,
) -> Gate:
    """A condition on the prompt, or on each token, fitted on examples: open for what is like the positive examples.

        open if <x, s> > b,   s = d / |d|,   d = mean_i x(p_i+) - mean_i x(p_i-),   b half way between the means
        clip(1/2 + (<x, s> - b) / |d|, low, high)    for curve="linear": 0 at one mean, 1 at the other
        1 / (1 + exp(-(<x, w> - c)))                 for curve="logistic": w, c by logistic regression

    `when` decides with it once for each row, on the unsteered prompt, or for each token. `~gate` is 1 minus `gate`,
    open if that is closed. Texts are read as prompts are when the gate decides, whatever `Pairs.read` is. For a prompt
    of one token the mean is zero.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model.
        data: Prompts for which the gate should be open (positive) and closed (negative).
        gate_layers: Layers to choose from; of several, the one that separates the examples best in units of their
            spread is taken. Default all. A layer after the first controlled one costs a second pass over each prompt:
            `gate_layers=range(first)` avoids it.
        point: Point of the block, see `Site`.
        pool: `"mean"` over the prompt's tokens except the one at position 0, or `"last"`: its last token.
        threshold: b, in activation units; c, in logits.
        curve: How a score becomes a strength: `"step"`, `"linear"` or `"logistic"`.
        low, high: Least and largest strength of the straight line, no unit; None: no bound.

    Returns:
        What `when` takes. Its `condition` is a `Side`, a `Ramp` or a `Probability`; its summary names the chosen layer.

    Raises:
        TypeError: data that are not `Pairs`.
        ValueError: an unknown pool or curve, bounds out of order, or without a straight line to bound; a layer or point
            the model does not have, sides with identical activations at every layer.

    Source: the step is ours. `curve="logistic"` with `each_token=True` is the regulator of DSAS (arXiv 2512.03661),
    which fits one for each controlled layer, on the mean over the tokens of a text, after a principal component
    analysis; here the activations are centred and divided by their root mean square distance from the mean, and the
    penalty is that of C = 1. `curve="linear"` without bounds has the form of CLAS (arXiv 2604.24693), which trains
    the line end to end by the likelihood of labelled text; here it goes through the means of two sets.
    """
    check_option("curve", curve, get_args(Curve))
    if (low, high) != (0.0, 1.0) and curve != "linear":
        raise ValueError(f"low={low}, high={high} bound a straight line, and this is curve={curve!r}; use 'linear'")
    host = host_of(model)
    sites = [Site(layer, point) for layer in every_layer(host, gate_layers)]
    host.check(sites)
    states = prompt_states(host, data, sites, pool)
    site, direction, middle = best_separating(states)
    if curve == "logistic":
        direction, middle = probe(*states[site])
    bound = torch.as_tensor(middle if threshold is None else threshold, dtype=direction.dtype)
    condition: Condition = Side(direction, bound)
    if curve == "logistic":
        condition = Probability(direction, bound)
    elif curve == "linear":
        positive, negative = (side.double().mean(0) for side in states[site])
        condition = Ramp(direction, bound, 1 / float((positive - negative).norm()), 0.5, low, high)
    return Gate(condition, [Summary(site, where=POOLS[pool])])


def when(controller: Controller, *gates: Gate, each_token: bool = False) -> Controller:
    """The same controller, acting only on prompts, or tokens, for which every gate is open.

        with steer(model, when(caa(model, pairs), gate(model, harmful_and_harmless))): ...

    Decided row by row on the unsteered prompt, and kept while tokens are generated. In addition to the signals of its
    method each loop records `gate` (the product of all), and what the gates' conditions measured, the second `score` as
    `score2`; an inverted gate reports the measurement before the inversion.

    Args:
        controller: Of any method.
        gates: Each multiplies the controls, by 0 or 1 or, with another `curve`, by a strength.
        each_token: Decide anew for each token, in the prompt too, from its own activation in the steered pass: what
            acts at earlier layers, or earlier tokens, has changed it already. Needs no second pass.

    Raises:
        TypeError: not a controller, or something that is not a gate.
        ValueError: `each_token` with a gate that looks behind the first layer where the controller acts; it would
            decide too late.
    """
    _need_controller("when", controller)
    for each in gates:
        if not isinstance(each, Gate):
            raise TypeError(f"when() takes gates, it got a {type(each).__name__}; make one with gate(model, data)")
        for summary in each.summaries:
            check_where(summary.where)
    chosen = [each.of_each_token() if each_token else each for each in gates]
    loops = [loop.replace(gates=(*loop.gates, *chosen)) for loop in controller.loops]
    return Controller(loops, controller.recipe | {"gates": len(loops[0].gates) if loops else 0})


def schedule(controller: Controller, factors: Sequence[float] | Tensor, *, prompt: float = 1.0) -> Controller:
    """The same controller, its strength multiplied by factors that change over a generation.

        u_i <- factors[i] u_i   in the pass that produces generated token i; the last factor holds from then on

    For i = 0 that is the last token of the prompt. Two schedules multiply. Factors do not extend `where`: a controller
    that acts on the prompt alone needs `.at("last")` or another position to act later.

    Args:
        controller: Of any method.
        factors: At least one number.
        prompt: Factor at the tokens of the prompt before its last.

    Raises:
        TypeError: not a controller.
        ValueError: no factors, or one that is not finite; several for a controller that acts on the prompt alone.
    """
    _need_controller("schedule", controller)
    values = torch.as_tensor(factors, dtype=torch.float32).detach().clone()
    if values.ndim != 1 or not len(values) or not torch.isfinite(values).all():
        raise ValueError(f"factors={factors!r}; give one finite number for each generated token, at least one")
    early = {loop.where for loop in controller.loops if isinstance(loop.where, str)} & {*PROMPT_ONLY}
    if len(values) > 1 and early:
        raise ValueError(
            f"where={min(early)!r} ends with the prompt, so that the factors after the first do nothing; move the "
            "controller to later tokens first, for example with .at('last')"
        )
    added = Schedule(values, float(prompt))
    loops = [loop.replace(schedules=(*loop.schedules, added)) for loop in controller.loops]
    return Controller(loops, controller.recipe | {"schedules": len(loops[0].schedules) if loops else 0})


def prompt_states(host: Host, data: Pairs, sites: Sequence[Site], pool: str) -> dict[Site, tuple[Tensor, Tensor]]:
    """Positive and negative texts, read as a gate reads prompts: `[text d]` each."""
    check_option("pool", pool, POOLS)
    check_contrast(data)
    read = []
    for side in data.sides(host):
        weights = [_weights(len(tokens), pool) for tokens in side.tokens]
        read.append(host.read(side.tokens, weights, sites))
        for site, values in read[-1].items():
            check_finite(values, site, host)
    return {site: (read[0][site].flatten(1), read[1][site].flatten(1)) for site in sites}


def best_separating(states: dict[Site, tuple[Tensor, Tensor]]) -> tuple[Site, Tensor, Tensor]:
    """The site whose mean difference separates two sets best: the site, the unit direction, half way between the means.

    Separation is the distance of the means over the root of the mean variance along the direction; of equal ones the
    earlier layer is chosen.
    """
    best = None
    for site in sorted(states):
        positive, negative = (side.double() for side in states[site])
        difference = positive.mean(0) - negative.mean(0)
        distance = float(difference.norm())
        if not distance:
            continue
        direction = difference / distance
        a, b = positive @ direction, negative @ direction
        spread = float(((a.var(unbiased=False) + b.var(unbiased=False)) / 2).sqrt())
        # one example a side has no spread; the distance itself then ranks
        merit = distance / spread if spread > 1e-9 * distance else distance * 1e9
        if best is None or merit > best[0] * (1 + 1e-9):
            best = (merit, site, direction.to(states[site][0].dtype), (a.mean() + b.mean()) / 2)
    if best is None:
        raise ValueError("both sides have identical activations at every layer; a gate needs prompts that differ")
    return best[1:]


def probe(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """Logistic regression of sets `[text d]`: a direction `[d]` in logits per activation unit, a threshold `[]`."""
    states = torch.cat([positive, negative]).double()
    middle = states.mean(0)
    # without a unit, so that the penalty means the same for every layer and model
    unit = (states - middle).square().sum(1).mean().sqrt()
    x = (states - middle) / unit
    labels = torch.tensor([1.0] * len(positive) + [0.0] * len(negative))
    a, k = logistic(x @ x.T, labels)
    direction = x.T @ a / unit
    return direction.to(positive.dtype), direction @ middle - k


def _weights(length: int, pool: str) -> list[float]:
    if pool == "last":
        return [float(position == length - 1) for position in range(length)]
    # as the position names do, position 0 is left out
    return [0.0] + [1 / (length - 1)] * (length - 1) if length > 1 else [0.0]


def _need_controller(name: str, controller: Any) -> None:
    if not isinstance(controller, Controller):
        raise TypeError(f"{name}() takes a Controller, it got a {type(controller).__name__}; call the method first")
