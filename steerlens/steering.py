"""Attach a controller to a model, and remove it again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from steerlens.core import (
    Controller,
    Pass,
    Record,
    Site,
    SiteSignals,
    check_lengths,
    check_loops,
    check_record,
    check_where,
    name_signals,
)
from steerlens.core.tables import VIEWS
from steerlens.core.types import Cache, Figure, PromptLengths, RecordSpec, Where
from steerlens.hosts import Dimensions, Host, host_of
from steerlens.hosts.steered import Steered
from steerlens.hosts.types import Model
from steerlens.pages.markup import fragment, text
from steerlens.pages.reprs import controller_html, controller_pieces, record_html, record_pieces
from steerlens.plots import plot_record

if TYPE_CHECKING:
    from steerlens.hosts.traced.explicit import Applied


def steer(
    model: Model,
    controller: Controller,
    *,
    where: Where | None = None,
    strength: float = 1.0,
    record: RecordSpec = "scalars",
    trust: bool = False,
    payload_limit: int = 16 * 2**20,
    timeout_s: float = 3600.0,
) -> Run:
    """Steer every call of a model until the returned run is closed.

        with steer(model, controller) as run:
            model.generate("I think that", max_new_tokens=40)
        run.record

    or `run = steer(model, controller)` ... `run.remove()`. Runs may be nested and removed in any order; the later one
    sees what the earlier one added.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model.
        controller: What a method returned.
        where: Other token positions than the controller's own, see `Loop`.
        strength: Factor on every control, as `controller * strength`.
        record: What to keep of the signals: `"scalars"` (one number per token), `"all"`, names such as
            `("u", "error")`, or None. Nothing else is computed. Unless it is None, all signals are hook points on
            TransformerLens while the run lasts (`blocks.5.hook_steer_u`), computed if they have a hook:
            `run_with_cache` caches them and a hook may patch them.
        trust: Attach although the model is not the one the controller was fitted on.
        payload_limit: Largest request in bytes that nnsight may send to a server.
        timeout_s: Longest wait for a server's result, its queue included.

    Raises:
        TypeError: not a controller, or a model of no known library.
        ValueError: a layer, point or width the model does not have; a model other than the controller's, unless
            `trust`; an unknown `where` or `record`; a law that does not return what it declares, holds a NaN, or adds
            more than the model's dtype can hold. In all these cases nothing is attached.
    """
    host = host_of(model)
    options: dict[str, Any] = {"where": where, "strength": strength, "record": record, "trust": trust}
    controller = _prepare(host, controller, dtype=host.dtype, **options)
    if any(_same(other.controller, controller) for other in runs(host)):
        warnings.warn(
            f"{controller!r} is attached to this model already and acts twice from now on; steerlens.runs(model) lists "
            "what is attached, steerlens.clear(model) removes it",
            stacklevel=2,
        )
    return Run(host, controller, record, payload_limit, timeout_s)


def runs(model: Model) -> list[Run]:
    """The runs that steer a model, in the order in which they act."""
    steered = Steered.of(host_of(model).model)
    return [] if steered is None else [each.owner for each in steered.attached if each.owner is not None]


def clear(model: Model) -> None:
    """Remove everything that steers a model."""
    steered = Steered.of(host_of(model).model)
    for attachment in reversed([] if steered is None else steered.attached):
        attachment.detach()


class Apply:
    """Steer from inside a block of nnsight, here or on a server:

        with lm.generate("I think that", max_new_tokens=40, remote=True) as tracer:
            run = apply(lm, controller)
            tokens = tracer.result.save()
        run.record

    Call it first in the block. It steers every forward pass of that trace or generation; inside an invoke, only the
    rows of that invoke. The block reads steered values at every layer. `with steer(model, controller)` does the same
    for all calls inside it; `apply` gives each trace or each invoke a controller of its own.

    Args:
        model: The nnsight model that is traced.
        controller, where, strength, record, trust: As in `steer`.
        prompt_lengths: Lengths of the prompts if the texts go on after them, as in `Run.scoring`.

    Returns:
        An `Applied`. Its `record` is complete when the block has ended, on the client too.

    Raises:
        TypeError, ValueError: as `steer`, at the server in a remote block.
        RuntimeError: outside of a trace, or after the block has read or written something.
    """

    # an object and no function: nnsight would send a function's source to a server, and its `import` with it
    __name__ = "apply"

    def __call__(
        self,
        model: Model,
        controller: Controller,
        *,
        where: Where | None = None,
        strength: float = 1.0,
        record: RecordSpec = "scalars",
        trust: bool = False,
        prompt_lengths: PromptLengths | None = None,
    ) -> Applied:
        """See the class."""
        host = host_of(model)
        if host.library != "nnsight":
            raise TypeError(
                f"apply() steers from inside a block of nnsight; a {type(host.model).__name__} is steered with "
                "steer(model, controller)"
            )
        from steerlens.hosts.traced.explicit import apply_here
        from steerlens.hosts.traced.known import applying

        options: dict[str, Any] = {"where": where, "strength": strength, "record": record, "trust": trust}
        options |= {"prompt_lengths": prompt_lengths, "follows": partial(applying, host)}
        return apply_here(_prepare, host.model, controller, **options)

    def __reduce__(self) -> tuple[Any, ...]:
        """It is pickled as functions, which can be sent to a server."""
        from steerlens.hosts.traced.explicit import apply_here

        return partial, (apply_here, _prepare)

    def __repr__(self) -> str:
        return "steerlens.apply"


apply = Apply()


class Run:
    """A controller at work on a model: a context manager, and the record of what it did.

    Attributes:
        controller: What is attached.
        record: Signals of the latest sequence (one call of `generate`, or one forward pass), see `Record`. It is
            replaced when the next sequence begins; `run.record.copy()` keeps it.
    """

    def __init__(self, host: Host, controller: Controller, record: RecordSpec, payload_limit: int, timeout_s: float):
        self.controller = controller
        self._host = host
        self._removed = False
        self._pass = Pass(controller.loops, record=record, run=_free_name(host, controller))
        self._attachment = host.attach(self._pass, payload_limit=payload_limit, timeout_s=timeout_s)
        self._attachment.owner = self

    @property
    def record(self) -> Record:
        """Signals of the latest sequence."""
        return self._pass.log

    @property
    def signals(self) -> Mapping[Site, SiteSignals]:
        """Hook names of what is recorded, by the sites where loops act: each loop's own, and their totals."""
        return self._pass.names

    @property
    def payload_bytes(self) -> int | None:
        """Size of the latest request to a server, controller and travelling code included; None on a local run."""
        return self._attachment.payload_bytes

    @contextmanager
    def scoring(self, prompt_lengths: PromptLengths) -> Iterator[None]:
        """Declare where the prompts end, for forward passes over prompts together with their answers:

            with run.scoring([7, 5]):
                logits = model(prompts_and_answers, attention_mask=mask)

        Then `where`, gates, schedules, tangents and signals mean what they mean while the answers are generated, so
        that scored log-probabilities equal those of the generation. Without it, all tokens of a pass count as prompt.
        `generate` does not need it.

        Args:
            prompt_lengths: Real tokens of the prompt, BOS included, one number for all rows or one for each row of the
                batch.

        Raises:
            TypeError: lengths that are not whole numbers.
            ValueError: a length below 1; in a pass, a number of lengths that is not the number of rows.
        """
        self._pass.score(check_lengths(prompt_lengths))
        try:
            yield
        finally:
            self._pass.score(None)

    def remove(self) -> None:
        """Remove the controller; a second call does nothing."""
        self._attachment.detach()
        self._removed = True

    def to_cache(self) -> Cache:
        """The record as a TransformerLens `ActivationCache`; TransformerLens must be installed."""
        return self.record.to_cache(self._host.model)

    def plot(self) -> Figure:
        """Tracking error and control norm by layer and token, a plotly figure."""
        return self.record.plot()

    def _repr_html_(self) -> str:
        state = "removed from" if self._removed else "attached to"
        head = f"<p><b>Run</b>, {state} a {text(type(self._host.model).__name__)}</p>"
        return fragment(head, controller_pieces(self.controller), record_pieces(self.record))

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.remove()
        finally:  # an interrupt may have come just before
            self.remove()

    def __repr__(self) -> str:
        state = "removed" if self._removed else "attached"
        return f"Run({self.controller!r} on {type(self._host.model).__name__}, {state}; {self.record!r})"


def _prepare(
    model: Dimensions,
    controller: Controller,
    *,
    where: Where | None = None,
    strength: float = 1.0,
    record: RecordSpec = "scalars",
    trust: bool = False,
    dtype: torch.dtype | None = None,
) -> Controller:
    """The controller with the options of `steer`, checked against the model; travels with `apply`.

    `dtype` is that of the model, if it is known.
    """
    if not isinstance(controller, Controller):
        raise TypeError(
            f"steer() takes a Controller, it got a {type(controller).__name__}; call the method first: caa(model, data)"
        )
    check_record(record, controller.loops)
    if where is not None:
        check_where(where)
        controller = controller.at(where)
    if strength != 1.0:
        controller = controller * strength
    _check_fit(model, controller, trust)
    check_loops(controller.loops, model.shape, dtype)
    return controller


def _same(a: Controller, b: Controller) -> bool:
    """Whether two controllers do the same: fitted alike, acting at the same places with the same strength."""
    if a is b:
        return True
    return bool(a.recipe) and a.recipe == b.recipe and [repr(loop) for loop in a.loops] == [repr(x) for x in b.loops]


def _check_fit(host: Dimensions, controller: Controller, trust: bool) -> None:
    sites = {site for loop in controller.loops for site in (loop.act, loop.sense, loop.reference) if site is not None}
    sites |= {site for loop in controller.loops for site in loop.gated_by}
    host.trust(sites | {summary.site for loop in controller.loops for summary in loop.summaries})
    if any(loop.tangent is not None for loop in controller.loops):
        host.need_parameters()
    for method, fitted in () if trust else controller.fingerprints:
        differences = host.differences(fitted)
        if differences:
            words = "; ".join(differences)
            raise ValueError(
                f"this {method} was fitted on another model: {words}. Fit it on this one, or pass trust=True"
            )
        remark = host.remark(fitted)
        if remark is not None:
            warnings.warn(f"{method}: {remark}", stacklevel=4)


def _free_name(host: Host, controller: Controller) -> str:
    """What keeps this run's signal names apart from those of runs that are attached already: "", then "run2", ..."""
    name, number = "", 1
    while any(
        host.signal_taken(hook) for site in name_signals(controller.loops, name).values() for hook in site.names()
    ):
        number += 1
        # no digit right after "steer": TransformerLens would take it for a layer
        name = f"run{number}"
    return name


def _cache(record: Record, model: Model | None) -> Cache:
    """See `Record.to_cache`."""
    from steerlens.hosts.lens.record import activation_cache

    known = model if hasattr(model, "cfg") else None
    layers = [0, *(int(name.split(".")[1]) for name in record)]
    return activation_cache(record, known, max(layers) + 1 if model is None else host_of(model).n_layers)


VIEWS.update(plot=plot_record, cache=_cache, controller=controller_html, record=record_html)
