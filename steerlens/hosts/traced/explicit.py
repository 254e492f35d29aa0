"""Steering from inside a traced block; sent to servers by source, so it names no module of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nnsight
from nnsight.intervention.interleaver import Mediator

from steerlens.core import Controller, Pass, Record, check_lengths
from steerlens.core.types import Cache, Figure, PromptLengths, RecordSpec
from steerlens.hosts.traced.anatomy import Anatomy
from steerlens.hosts.traced.edit import Passes, follow, steers


class Applied:
    """What `apply` returns: the record of its trace or generation, complete when the block has ended.

    Attributes:
        record: Signals of the sequence, as in a `Run`.
    """

    def __init__(self, record: Record, n_layers: int):
        self.record = record
        self._n_layers = n_layers

    def to_cache(self) -> Cache:
        """The record as a TransformerLens `ActivationCache`; TransformerLens must be installed."""
        from steerlens.hosts.lens.record import activation_cache

        return activation_cache(self.record, None, self._n_layers)

    def plot(self) -> Figure:
        """Tracking error and control norm by layer and token, a plotly figure."""
        from steerlens.plots import plot_record

        return plot_record(self.record)

    def __repr__(self) -> str:
        return f"Applied({self.record!r})"


def apply_here(
    prepare: Callable[..., Controller],
    model: Any,
    controller: Controller,
    *,
    record: RecordSpec = "scalars",
    prompt_lengths: PromptLengths | None = None,
    follows: Callable[[Pass], tuple[Passes, Callable[[], None]]] | None = None,
    **options: Any,
) -> Applied:
    """Steer every forward pass of the block that is running; arguments as in `steerlens.apply`.

    The body of `steer`'s edit becomes one more worker of this run, in front of the block's own, so that the block reads
    what is steered, in any layer and with every token of a generation.

    Args:
        prepare: Checks the controller against the model, and gives it the options.
        follows: Where the weights are, gives what begins the passes of a run, and what to call at their end.
    """
    try:
        block = Mediator.current("apply()")
    except ValueError:
        raise RuntimeError(
            "apply() was called outside of a trace; call it in the block of one, in a session in the blocks of its "
            "traces, in a trace with invokes in theirs. To steer whole calls: with steer(model, controller)"
        ) from None
    if block.pending is not None:
        raise RuntimeError(
            "apply() came after the forward pass had begun; call it once, first in its block and outside of loops: it "
            "steers every pass from there on"
        )
    anatomy = Anatomy(model)
    run = Pass(prepare(anatomy, controller, record=record, **options).loops, record=record)
    if prompt_lengths is not None:
        run.scored = [(0, check_lengths(prompt_lengths))]
    passes, end = (Passes(), _nothing) if follows is None else follows(run)
    # what the edits of a `with steer` have added to attention's outputs, if there are any, see `Tap.visit`
    edits = [edit for edit in model._edits if steers(edit)]
    carried = edits[0].lcls["carried"] if edits else {}
    worker = Mediator(
        compile(_BODY, "<steerlens.apply>", "exec"),
        {},
        {
            "follow": follow,
            "base": anatomy.base,
            "first": anatomy.entry,
            "taps": anatomy.taps(run),
            "apart": [anatomy.tap(site) for site in run.aside.apart],
            "run": run,
            "carried": carried,
            "passes": passes,
            "end": end,
        },
    )
    worker.batch_group = block.batch_group
    interleaver = block.interleaver
    interleaver.mediators.insert(interleaver.mediators.index(block), worker)
    worker.start(interleaver)
    # started by the block, it would hand its requests to the block; those are for the model
    worker.worker.parent = block.worker.parent
    return nnsight.save(Applied(run.log, anatomy.n_layers))


_BODY = """
try:
    follow(base, first, taps, apart, run, carried, passes)
finally:
    end()
"""


def _nothing() -> None:
    pass
