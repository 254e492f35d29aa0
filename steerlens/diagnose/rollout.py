"""One token's path through a plant under control: the blocks themselves, or their linear models."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from steerlens.control.linearization import Linearization
from steerlens.core import Companion, Controller, Loop, Now, Pass, Record, Site, map_tensors
from steerlens.hosts import Host, Nominal

Block = Callable[[Tensor], Tensor]

_RESIDUAL = ("resid_pre", "resid_post")


class Rollout:
    """What happened on the way.

    Attributes:
        states: `x[0] ... x[T]`, `[layer+1 d]`: the state before each block, and the last block's output.
        record: The signals, one token.
        own: The unsteered states, `[layer+1 d]`.
    """

    def __init__(self, states: Tensor, record: Record, own: Tensor):
        self.states = states
        self.record = record
        self.own = own

    def signal(self, name: str) -> dict[int, Tensor]:
        """One signal by layer, a number or `[d]` each; empty if no loop reports it."""
        held = any(key.partition(".hook_steer_")[2] == name for key in self.record)
        return {layer: value[0, 0] for layer, value in self.record.layers(name).items()} if held else {}


class KnownPath(Companion):
    """The unsteered states of one token, known beforehand.

    Args:
        states: `x[0] ... x[T]`, `[d]` each, as in `Rollout`.
    """

    def __init__(self, states: Sequence[Tensor]):
        self._path = states

    def states(self, sites: Sequence[Site], *, goes_on: bool) -> dict[Site, Tensor]:
        """Of the sites, between blocks."""
        return {site: self._path[site.layer + (site.point == "resid_post")][None, None] for site in sites}


def roll(
    blocks: Sequence[Block], start: Tensor, controller: Controller | None, position: int, own: Sequence[Tensor]
) -> Rollout:
    """Send a state through blocks, with the controller acting between them as it does in the model.

    The same `Pass` as in the model runs the loops, so strength, composition and dtype are those of a real run.

    Args:
        blocks: `f_t`, each `[n d] -> [n d]`.
        start: x[0], `[d]`.
        controller: Acts on the residual stream; None: nothing acts.
        position: Absolute position of the token, the last of its prompt.
        own: The token's unsteered states, `x[0] ... x[T]`, `[d]` each: what levels with `origin="own"` count from.
    """
    run = Pass(controller.loops if controller is not None else (), record="all")
    run.begin((1, 1), past=position, device=start.device, companion=lambda kept: KnownPath(own))
    x, states = start[None, None], [start]
    with torch.no_grad():
        for t, block in enumerate(blocks):
            x = run.at(Site(t, "resid_pre"), x)
            states[-1] = x[0, 0]
            x = run.at(Site(t, "resid_post"), block(x[0])[None])
            states.append(x[0, 0])
    return Rollout(torch.stack(states), run.log, torch.stack(list(own)))


def plant_of(host: Host, nominal: Nominal, linearization: Linearization | None) -> list[Tensor]:
    """A_t of every block: of a linearization, or of this very path.

    Raises:
        ValueError: the linearization is of another model.
    """
    if linearization is None:
        return [nominal.jacobian(t) for t in range(len(nominal.blocks))]
    check_model(host, linearization)
    return [A.to(host.device) for A in linearization.jacobians]


def check_model(host: Host, linearization: Linearization) -> None:
    """Raises ValueError unless the linearization is of this model."""
    differences = host.differences(linearization.model)
    if differences:
        raise ValueError(f"the linearization is of another model: {'; '.join(differences)}")


def exact_dtype(host: Host) -> torch.dtype:
    """What linear models are computed in: float64, which Apple's GPUs do not have."""
    return torch.float32 if host.device.type == "mps" else torch.float64


def affine(nominal: Nominal, jacobians: Sequence[Tensor], dtype: torch.dtype) -> list[Block]:
    """The linear models of the blocks around a path: `x -> x[t+1] + A_t (x - x[t])`."""

    def block(t: int) -> Block:
        here, after = nominal.states[t].to(dtype), nominal.states[t + 1].to(dtype)
        A = jacobians[t].to(here)
        return lambda x: after + (x - here) @ A.T

    return [block(t) for t in range(len(jacobians))]


def close(
    nominal: Nominal, jacobians: Sequence[Tensor], controller: Controller, position: int, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """The linear model with its loop closed, `d[t+1] = A_cl d[t] + w[t]`, d the deviation from the nominal path.

        A_cl = A_t + d u_t / d x_t,   w_t = u_t,   both at the nominal state

    For `u = g (beta - <v, x>)`: `A_cl = A_t - g v'`. Returns A_cl, `[d d]` each, and w, `[layer d]`.

    Raises:
        ValueError: a step depends on more than the state before its block.
    """
    blocks = affine(nominal, jacobians, dtype)
    own = [state.to(dtype) for state in nominal.states]
    closed, forcing = [], []
    for t, A in enumerate(jacobians):
        x = nominal.states[t].to(dtype)
        acting = [loop for loop in controller.loops if loop.act.layer == t]
        _check_markov(acting, nominal.states, dtype)

        def step(x: Tensor, t: int = t, acting: list[Loop] = acting) -> Tensor:
            run = Pass(acting, record=None)
            run.begin((1, 1), past=position, device=x.device, companion=lambda kept: KnownPath(own))
            after = blocks[t](run.at(Site(t, "resid_pre"), x[None, None])[0])
            return run.at(Site(t, "resid_post"), after[None])[0, 0]

        with torch.inference_mode(False), torch.enable_grad():
            closed.append(torch.func.jacrev(step)(x).detach() if acting else A.to(x))
            forcing.append(step(x).detach() - nominal.states[t + 1].to(dtype))
    return closed, torch.stack(forcing)


def check_followed(controller: Controller) -> None:
    """Raises ValueError for a loop that a rollout of the last token cannot follow."""
    for loop in controller.loops:
        for site in (loop.act, loop.sense, loop.reference or loop.sense):
            if site.point not in _RESIDUAL:
                raise ValueError(
                    f"the loop {loop.name!r} is at {site}, inside a block; this diagnosis follows the residual stream "
                    "from block to block and takes loops at resid_pre and resid_post"
                )
        if not (isinstance(loop.where, str) and loop.where == "last"):
            raise ValueError(
                f"the loop {loop.name!r} does not steer where='last'; this diagnosis follows the last token with its "
                "context unsteered: use controller.at('last')"
            )


def _check_markov(acting: Sequence[Loop], own: Sequence[Tensor], dtype: torch.dtype) -> None:
    for loop in acting:
        x = own[loop.act.layer].to(dtype)
        before = Site(loop.act.layer, "resid_pre")
        if (loop.sense, loop.act) != (before, Site(loop.act.layer, "resid_post")):
            words = f"senses {loop.sense} and acts at {loop.act}, not before and after one block"
        elif loop.reference not in (None, before):
            words = f"senses {loop.sense} and refers to {loop.reference}"
        else:
            now = Now(reference=x[None, None])
            map_tensors(loop.law, lambda tensor, x=x: tensor.to(x)).act(x[None, None], now)
            if not now.layers and not now.sequence:
                continue
            words = f"remembers earlier layers ({type(loop.law).__name__})"
        raise ValueError(f"the loop {loop.name!r} {words}: no bound is known; pass bound=False")
