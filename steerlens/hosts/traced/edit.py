"""What runs inside nnsight's edits, here or on a server: sent by source, so it names no module of ours."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from nnsight.intervention.interleaver import OutOfOrderError
from nnsight.intervention.iterator import Iterations
from nnsight.intervention.util import first_input, replace_first_input
from torch import Tensor

from steerlens.core import Pass, Site
from steerlens.hosts.blocks.bare import Bare
from steerlens.hosts.blocks.hf import call_shape
from steerlens.hosts.blocks.second_pass import BaseCompanion, Call, SecondPass
from steerlens.hosts.traced.walk import Walk, alone


class Tap:
    """Abstract: one location that the edit visits.

    On a server no location is a block's own input: in its sandbox a location's whole value goes to another process and
    back, and a block's arguments hold the KV cache, of which a copy would come back. What the block before puts out is
    the same state. Before the first block it is the input of its first norm: a write to that reaches attention only, so
    the control is added once more to what attention puts out (`Enter`, then `Carry`). One at `resid_mid` is added to
    what attention puts out, everywhere (`Before`, then `Mid`). All else is `Plain`.

    Upstream: NDIF's sandbox copies all arguments of a module, and cannot be asked for the first one; if it could be,
    `Enter` and `Carry` go. `Before` and `Mid` stay, for no module's input is the state between the branches alone.

    Args:
        envoy: The module.
        side: `"input"` or `"output"`.
        read: The site whose state is there.
        steers: The site of the pass that it serves; None where it serves another tap.
        heads: Number of heads into which the last dimension is split, 0 for none.
        scale: Factor between what the location holds and the state.

    Attributes:
        plain: A visit concerns this location only.
        rank: Order in which taps at one location are visited.
        location: Its name in nnsight.
        rows: Of the batch, for modules that are given batch and position as one dimension.
    """

    plain = False
    rank = 0

    def __init__(
        self,
        envoy: Any,
        side: str,
        read: Site,
        steers: Site | None = None,
        heads: int = 0,
        scale: float = 1.0,
    ):
        self.envoy = envoy
        self.side = side
        self.read = read
        self.steers = steers
        self.heads = heads
        self.scale = scale
        self.rows = 1
        self.location = f"{envoy.path}.{side}"

    @property
    def order(self) -> tuple[int, int, int]:
        """Sort key: the order of the forward pass, then of the kinds."""
        return (*self.read.order, self.rank)

    def raw(self) -> Any:
        """What the location holds: a module's output, or its arguments, positional and by keyword."""
        return self.envoy.inputs if self.side == "input" else self.envoy.output

    def held(self, raw: Any) -> Tensor:
        """The tensor in what the location holds."""
        if self.side == "input":
            raw = first_input(*raw)
        return raw if isinstance(raw, torch.Tensor) else raw[0]

    def state(self, raw: Any) -> Tensor:
        """The state in what the location holds, heads split."""
        x = raw if isinstance(raw, torch.Tensor) else self.held(raw)
        if self.scale != 1:
            x = x * self.scale
        if x.ndim == 2:
            x = x.unflatten(0, (self.rows, -1))
        return x.unflatten(-1, (self.heads, -1)) if self.heads else x

    def value(self) -> Tensor:
        """The state there."""
        return self.state(self.raw())

    def replaced(self, raw: Any, value: Tensor) -> Any:
        """What the location would hold with another state."""
        value = value.flatten(-2) if self.heads else value
        held = raw if isinstance(raw, torch.Tensor) else self.held(raw)
        if self.scale != 1:  # in this order, so that no control changes no bit
            value = held + ((value - self.state(raw)) / self.scale).view_as(held)
        elif held.ndim == 2:
            value = value.reshape(held.shape)
        if self.side == "input":
            return replace_first_input(*raw, value)
        if isinstance(raw, torch.Tensor):
            return value
        return [value, *raw[1:]] if isinstance(raw, list) else (value, *raw[1:])

    def write(self, raw: Any) -> None:
        """Replace what the location holds."""
        if self.side == "input":
            self.envoy.inputs = raw
        else:
            self.envoy.output = raw

    def visit(self, run: Pass, kept: dict[str, Tensor], carried: dict[Any, Tensor]) -> None:
        """Sense, act, or keep something for a later tap of the same block.

        Args:
            kept: Of this edit, in this pass.
            carried: By layer, what edits have added to attention's output for a control before the block; shared by all
                edits of a model, because the norm's input that a later edit reads holds it too.
        """
        raise NotImplementedError


class Plain(Tap):
    """Senses and acts where the state is.

    Attributes:
        then: The next tap, if that only senses what this one leaves: a block's input after the output of the block
            before. `way` holds the modules that the state goes through in between: block, block and norm.
    """

    plain = True
    then: Plain | None = None
    way: tuple[Any, Any, Any] | None = None

    def change(self, run: Pass, raw: Any) -> tuple[Any, Tensor]:
        """What the tap makes of what its location holds, and the state that it leaves there."""
        self.rows = run.positions.batch
        x = self.state(raw)
        steered = run.at(self.steers, x)  # type: ignore[arg-type]
        return (raw if steered is x else self.replaced(raw, steered)), steered

    def visit(self, run: Pass, kept: dict[str, Tensor], carried: dict[Any, Tensor]) -> None:
        """See `Tap.visit`."""
        raw = self.raw()
        changed, state = self.change(run, raw)
        if changed is raw:
            return
        self.write(changed)
        # as in `Enter`
        site = self.steers
        if site is not None and site.point == "resid_pre" and ("before", site.layer) in carried:
            carried["before", site.layer] = state

    def hands_on(self) -> bool:
        """Whether the next tap is `then` and no PyTorch hook can change the state on its way there."""
        if self.way is None:
            return False
        before, block, norm = self.way
        return not (
            before._module._forward_hooks or block._module._forward_pre_hooks or norm._module._forward_pre_hooks
        )


class Enter(Tap):
    """A control before the first block, at the input of its first norm."""

    rank = 1

    def visit(self, run: Pass, kept: dict[str, Tensor], carried: dict[Any, Tensor]) -> None:
        """See `Tap.visit`."""
        raw = self.raw()
        self.rows = run.positions.batch
        x = self.state(raw)
        zero = torch.zeros_like(x)
        u = run.at(self.steers, x, carrier=zero)  # type: ignore[arg-type]
        if u is zero:
            return
        kept["entered"] = u
        # an edit that came earlier acts between the branches later, on the state as all have left it
        if ("before", self.read.layer) in carried:
            carried["before", self.read.layer] = x + u
        self.write(self.replaced(raw, x + u))


class Before(Tap):
    """Keeps the state before a block for a control between its branches."""

    rank = 2

    def visit(self, run: Pass, kept: dict[str, Tensor], carried: dict[Any, Tensor]) -> None:
        """See `Tap.visit`."""
        self.rows = run.positions.batch
        carried["before", self.read.layer] = self.value()


class Mid(Tap):
    """A control between the branches, added to what attention puts out."""

    rank = 3

    def visit(self, run: Pass, kept: dict[str, Tensor], carried: dict[Any, Tensor]) -> None:
        """See `Tap.visit`."""
        raw = self.raw()
        self.rows = run.positions.batch
        x = self.state(raw)
        twice = carried.get(self.read.layer)
        state = carried["before", self.read.layer] + (x if twice is None else x - twice)
        steered = run.at(self.steers, state, carrier=x)  # type: ignore[arg-type]
        if steered is not x:
            self.write(self.replaced(raw, steered))


class Carry(Tap):
    """Adds what `Enter` has added once more, to what attention puts out."""

    rank = 4

    def visit(self, run: Pass, kept: dict[str, Tensor], carried: dict[Any, Tensor]) -> None:
        """See `Tap.visit`."""
        if "entered" not in kept:
            return
        raw = self.raw()
        self.rows = run.positions.batch
        u = kept.pop("entered")
        self.write(self.replaced(raw, self.state(raw) + u))
        carried[self.read.layer] = u + carried[self.read.layer] if self.read.layer in carried else u


class StoodDown:
    """A context in which nnsight does not see what a module does, as in an ad-hoc call of its envoy.

    Args:
        envoy: Of the module.
        bare: PyTorch's own hooks do not see it either.
    """

    def __init__(self, envoy: Any, bare: bool = False):
        self.interleaver = envoy.interleaver
        self._bare = Bare(envoy._module) if bare else None

    def __enter__(self) -> None:
        if self._bare is not None:
            self._bare.__enter__()
        self._before = self.interleaver.interleaving
        self.interleaver.interleaving = False

    def __exit__(self, *_: Any) -> None:
        self.interleaver.interleaving = self._before
        if self._bare is not None:
            self._bare.__exit__()


def spots_of(taps: list[Tap]) -> dict[Site, Any]:
    """Where the states of taps are among the modules."""
    return {tap.read: (tap.envoy._module, tap.side, tap.heads, tap.scale) for tap in taps}


class Passes:
    """How the passes of a trace or a generation follow each other, as far as their shapes tell: on a server.

    The first pass brings the whole prompt, each later one continues the sequence.
    """

    def begin(self, run: Pass, call: dict[str, Any], step: int, **options: Any) -> None:
        """Begin a pass of a run; `call` as `call_shape` gives it."""
        past = int(call["past"])
        if type(self) is Passes:
            refuse_untold(call["shape"][1], past, run.positions.seen, step)
        run.begin(
            call["shape"],
            past=run.positions.seen if past < 0 else past,
            mask=call["mask"],
            device=call["device"],
            sequence=run.sequence if step else None,
            tokens=call["tokens"],
            end=run.positions.end if step else None,
            **options,
        )


def follow(
    base: Any, first: Any, taps: list[Tap], apart: list[Tap], run: Pass, carried: dict[Any, Tensor], passes: Passes
) -> None:
    """The body of the edit: visit the taps in every forward pass of one trace or generation.

    Args:
        base: The Hugging Face base model, whose arguments tell mask and cache of the first pass.
        first: None where the weights are here. On a server, where reading `base`'s arguments would send the KV cache to
            the sandbox and back at every token, the first norm of the first block: its input tells the shape.
        apart: Where the states are that a companion is asked for.
        passes: Begins each pass.
    """
    # a server's model has no hooks of the user's
    second = second_pass(base, apart, bare=first is None) if apart else None
    for step in Iterations()[:]:
        try:
            whole = step == 0 or first is None or run.aside.accompanied
            inputs = base.inputs if whole else None
            ids = embedding(base).input if inputs is None and run.reads_tokens else None
            call = later_shape(first.input, run, ids) if inputs is None else call_shape(*inputs)
        except OutOfOrderError:
            if step == 0:
                raise
            return  # the generation is over: the loop asked for a pass that never came
        if type(call["tokens"]).__name__ == "FakeTensor":
            return  # `scan` looks for shapes, which no control changes
        companion = None
        if second is not None and inputs is not None and not _weightless(base._module):
            companion = partial(BaseCompanion, second, Call(inputs[0], inputs[1], int(call["past"])))
        passes.begin(run, call, step, companion=companion, alone=not apart or only_run(base))
        carried.clear()
        kept: dict[str, Tensor] = {}
        # on a server this is inside the visit of `first`, where no walk can begin; the wire costs more than it saves
        worker = alone(base) if first is None else None
        index = 0
        while index < len(taps):
            if worker is not None and taps[index].plain:
                index = Walk(worker, run, taps, index).go()
            else:
                taps[index].visit(run, kept, carried)
                index += 1


def second_pass(base: Any, apart: list[Tap], *, bare: bool) -> SecondPass:
    """The model beside the passes of an edit; `bare`: without its hooks."""
    return SecondPass(
        base._module, lambda: StoodDown(base, bare), lambda sites: spots_of([tap for tap in apart if tap.read in sites])
    )


def only_run(base: Any) -> bool:
    """Whether no other edit or `apply` of ours is at work in this pass; a sandbox does not show them."""
    return sum(steers(worker) for worker in getattr(base.interleaver, "mediators", [])) < 2


def steers(worker: Any) -> bool:
    """Whether an edit, or a worker of a run, is one of ours."""
    return isinstance((getattr(worker, "lcls", None) or {}).get("run"), Pass)


def _weightless(module: Any) -> bool:
    """Whether this is a sandbox's copy of the model, which has the modules and not their weights."""
    return module is None or next(module.parameters()).is_meta


def refuse_untold(length: int, past: int, seen: int, step: int) -> None:
    """Raises NotImplementedError for a pass that could be told from others by its cache only.

    Args:
        length, past: Of the pass, and columns in its cache, -1 if that does not count them.
        seen: Columns after the pass before it.
        step: Number of the pass.
    """
    option = None
    if step == 0:
        option = "past_key_values" if past > 0 else None
    elif not (length == 1 and past in (seen, -1)) and not (length == seen + 1 and past == 0):
        option = "prefill_chunk_size, prompt_lookup_num_tokens, assistant_model or guidance_scale"
    if option is not None:
        raise NotImplementedError(f"{option} cannot be steered on a server, where caches are not seen; leave it out")


def embedding(base: Any) -> Any:
    """The envoy of the token embedding, whose input is the ids alone."""
    module = base._module.get_input_embeddings()
    return next(envoy for envoy in base.modules() if envoy._module is module)


def later_shape(x: Tensor, run: Pass, ids: Tensor | None) -> dict[str, Any]:
    """The arguments of `Pass.begin`, told from the state of a pass that is not the first of its generation."""
    seen = run.positions.seen
    # without a KV cache each pass repeats the sequence and adds a token
    past = 0 if x.shape[1] == seen + 1 else seen
    return {
        "shape": (x.shape[0], x.shape[1]),
        "past": past,
        "mask": None,
        "device": x.device,
        "cache": None,
        "tokens": ids,
    }
