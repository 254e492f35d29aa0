"""nnsight's remote execution: how a run's record comes back, what may not be sent, and how a failure is reported."""

from __future__ import annotations

import ast
import linecache
import sys
import time
from collections.abc import Callable
from types import FrameType, SimpleNamespace
from typing import Any, NamedTuple

import nnsight
from nnsight.intervention.backends.remote import RemoteBackend, RemoteError
from nnsight.schema.response import Status
from nnsight.tracing.tracer import WithBlockNotFoundError

from steerlens.core import Pass
from steerlens.hosts.steered import Steered

# nnsight sends an installed package by reference, and a server does not have this one
nnsight.register("steerlens")

_RECORD = "steerlens_record_{}"


class Limits(NamedTuple):
    """What a request may take.

    Attributes:
        payload_bytes: Size of the request.
        timeout_s: From sending it to having its result, the server's queue included.
    """

    payload_bytes: float
    timeout_s: float


class RemoteForms:
    """Stands on a model while it is steered: lets remote calls bring the records of its runs back.

    nnsight returns what the user's own block saves, never what an edit saves. So the block that is sent gets one more
    statement, in front, that saves the records which the edits fill. And `model.generate(..., remote=True)` without a
    `with`, which nnsight would run on local weights, is given a block.

    Upstream: nnsight (0.8.1) returns nothing that an edit saves, and has no remote call without a block; with both this
    class, `SteeredBackend` and `_with_saves` go.
    """

    def __init__(self, model: Any):
        self.model = model
        self.runs: list[tuple[Pass, Limits]] = []
        self.payload_bytes: int | None = None

    @classmethod
    def enter(cls, steered: Steered, model: Any, run: Pass, limits: Limits) -> RemoteForms:
        """Add a run to the forms of a model, installing them for the first."""
        if steered.forms is None:
            steered.forms = cls(model)
        forms: RemoteForms = steered.forms
        forms.runs.append((run, limits))
        model.__dict__["generate"] = _Generate(forms)
        model.__dict__["_remote_backend"] = _MakeBackend(forms)
        return forms

    def leave(self, run: Pass) -> None:
        """Take a run off; the last one takes the forms off the model."""
        self.runs = [(other, limits) for other, limits in self.runs if other is not run]
        if not self.runs:
            for name in ("generate", "_remote_backend"):
                self.model.__dict__.pop(name, None)

    @property
    def limits(self) -> Limits:
        """The tightest of all runs."""
        limits = [limits for _, limits in self.runs]
        return Limits(min(each.payload_bytes for each in limits), min(each.timeout_s for each in limits))


class _OfClass:
    """On the server the class's own method is found in its place."""

    name: str

    def __init__(self, forms: RemoteForms):
        self.forms = forms

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, str]]:
        return getattr, (self.forms.model, self.name)


class _Generate(_OfClass):
    name = "generate"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.forms.model
        function = type(model).generate.__wrapped__.__get__(model)
        if model.interleaver.interleaving:
            return function(*args, **kwargs)
        if kwargs.get("remote"):
            _refuse(kwargs, any(run.record is not None for run, _ in self.forms.runs))
        tracer = model.trace(*args, fn=function, **kwargs)
        try:
            tracer.capture()  # looks for a `with` two frames up: in the caller of this method
            if not _is_body(tracer.node, sys._getframe(1)):
                return tracer
        except WithBlockNotFoundError:
            pass
        if not kwargs.get("remote"):
            # `remote=False` is for nnsight, and no argument of the model
            kwargs.pop("remote", None)
            return model.interleave(function, *args, **kwargs)
        return _generate_in_a_block(model, args, kwargs)


#: Options of `generate` with which the first pass is not the whole prompt, or a later one is no decoding step.
_UNTOLD = ("prefill_chunk_size", "prompt_lookup_num_tokens", "assistant_model", "past_key_values", "guidance_scale")


def _refuse(options: dict[str, Any], records: bool) -> None:
    """Raises NotImplementedError for a generation whose passes a server does not tell apart."""
    config = options.get("generation_config")

    def asked(name: str) -> Any:
        value = options.get(name)
        return getattr(config, name, None) if value is None else value

    for name in _UNTOLD:
        if asked(name) not in (None, 1):
            raise NotImplementedError(f"{name} cannot be steered on a server, where caches are not seen; leave it out")
    if records and (asked("num_beams") or 1) > 1:
        raise NotImplementedError("a beam search cannot be recorded on a server; steer it with record=None")


def _is_body(node: Any, frame: FrameType) -> bool:
    """Whether a call is in the body of the `with` on its line, as `generate` is in `with steer(...): lm.generate(...)`.

    nnsight goes by lines, and would take the call for what opens the block; the block would never run.
    """
    first = node.body[0]
    line, _, column, _ = list(frame.f_code.co_positions())[frame.f_lasti // 2]
    if line is None or column is None or first.lineno > line:
        return False
    source = linecache.getline(frame.f_code.co_filename, node.lineno)
    # nnsight parses the block without its indentation, or else the whole file
    shift = len(source) - len(source.lstrip()) - node.col_offset
    return (first.lineno, first.col_offset + shift) <= (line, column)


def _generate_in_a_block(model: Any, args: Any, kwargs: Any) -> Any:
    with type(model).generate(model, *args, **kwargs) as tracer:
        tokens = tracer.result.save()
    return tokens  # noqa: RET504 (bound by the trace)


class _MakeBackend(_OfClass):
    name = "_remote_backend"

    def __call__(self, remote: Any, blocking: bool, job_id: str | None, verbose: bool) -> Any:
        model = self.forms.model
        plain = type(model)._remote_backend(model, remote, blocking, job_id, verbose)
        if not isinstance(plain, RemoteBackend):  # remote="local"
            return plain
        if not blocking:
            raise NotImplementedError(
                "blocking=False leaves before the record is there; steer with blocking=True, or trace without steer()"
            )
        return SteeredBackend(plain, self.forms)


def backend(model: Any, remote: bool | str, timeout_s: float) -> Any:
    """For `model.trace(backend=...)`: as `remote=`, with failures reported in one sentence."""
    plain = model._remote_backend(remote, True, None, False)
    return TellingBackend(plain, timeout_s) if type(plain) is RemoteBackend else plain


class TellingBackend(RemoteBackend):
    """A remote backend that reports first what went wrong, and does not wait for ever."""

    display: Any

    def __init__(self, plain: RemoteBackend, timeout_s: float):
        self.__dict__.update(plain.__dict__)
        self.timeout_s = timeout_s

    def request(self, request: Any, tracer: Any) -> Any:
        """As nnsight's.

        Raises:
            RemoteError: the server refused, or the block failed there.
            ConnectionError: the server is not there, or is gone.
            TimeoutError: the result has not come in time.
        """
        import websocket  # nnsight imports it with the first request only

        clock = self.display = _Clock(self.display, self.timeout_s, self.host)
        waiting = websocket.getdefaulttimeout()
        # for the greeting, which nnsight awaits without any limit
        websocket.setdefaulttimeout(self.timeout_s)
        try:
            return super().request(request, tracer)
        except RemoteError as error:
            raise RemoteError(self._hide(_cause(str(error)))) from None
        except (websocket.WebSocketTimeoutException, TimeoutError):
            raise clock.late() from None
        except (OSError, EOFError, websocket.WebSocketException) as error:
            text = self._hide(_refusal(error))
            raise ConnectionError(f"the NDIF server at {self.host} cannot be reached: {text}") from None
        finally:
            websocket.setdefaulttimeout(waiting)

    def _hide(self, text: str) -> str:
        """A server may quote the API key that it does not accept."""
        return text.replace(self.api_key, "<api key>") if self.api_key else text


class SteeredBackend(TellingBackend):
    """Sends the records along, and puts what comes back into the runs."""

    def __init__(self, plain: RemoteBackend, forms: RemoteForms):
        TellingBackend.__init__(self, plain, forms.limits.timeout_s)
        self.forms = forms

    def _serialize(self, tracer: Any) -> bytes:
        blob = super()._serialize(tracer)
        self.forms.payload_bytes = len(blob)
        limit = self.forms.limits.payload_bytes
        if len(blob) > limit:
            raise ValueError(
                f"the request has {len(blob) / 1e6:.1f} MB, the limit is {limit / 1e6:.1f} MB; send gains without full "
                "matrices (full_gain=False), or raise payload_limit"
            )
        return blob

    def request(self, request: Any, tracer: Any) -> Any:
        """With one statement more in the block."""
        frame, node = tracer.info.frame, tracer.node
        logs = {_RECORD.format(index): run.log.held for index, (run, _) in enumerate(self.forms.runs) if run.record}
        tracer.node = _with_saves(node, list(logs))
        tracer.info.frame = SimpleNamespace(
            f_locals={**frame.f_locals, **{f"{name}_": log for name, log in logs.items()}},
            f_globals=frame.f_globals,
            f_code=frame.f_code,
        )
        try:
            result = super().request(request, tracer)
        finally:
            tracer.node, tracer.info.frame = node, frame
        for name, log in logs.items():
            returned = result.pop(name, None) if isinstance(result, dict) else None
            if returned is not None:
                log.clear()
                log.update(returned)
        return result


class _Clock:
    """Ends a wait that has taken too long.

    Stands in for nnsight's display, which is asked to refresh ten times a second while the result is awaited: there is
    no other place between two messages of the server.

    Upstream: nnsight (0.8.1) waits without a limit; goes with a time limit of its backend.
    """

    def __init__(self, display: Any, limit_s: float, host: str):
        self.display = display
        self.limit_s = limit_s
        self.host = host
        self.enabled = True  # else nobody asks it
        self.status = "no answer"
        self._end = time.monotonic() + limit_s

    def update(self, response: Any) -> None:
        """The server has told a job's status."""
        self.status = response.status.value
        if response.status == Status.COMPLETED:
            self.enabled = self.display.enabled  # decides on a progress bar for the download
        self.display.update(response)

    def refresh(self) -> None:
        """A tenth of a second has passed."""
        self.display.refresh()
        if time.monotonic() > self._end:
            raise self.late()

    def late(self) -> TimeoutError:
        """The error to raise."""
        return TimeoutError(
            f"no result from the NDIF server at {self.host} within {self.limit_s:g} s, the latest status is "
            f"{self.status}; what it has begun it may still finish. Raise timeout_s, or ask whoever runs it"
        )


def _with_saves(node: Any, names: list[str]) -> Any:
    """The traced block with `name = nnsight.save(name_)` in front; the block itself is shared and stays as it is."""
    first = node.body[0].lineno
    statements = ast.parse("\n".join(f"{name} = __import__('nnsight').save({name}_)" for name in names)).body
    for statement in statements:
        ast.increment_lineno(statement, max(1, first - len(names)) - statement.lineno)
    copy = ast.With(items=node.items, body=[*statements, *node.body])
    return ast.copy_location(copy, node)


def _refusal(error: Exception) -> str:
    """The words of an error of the connection: without a response's headers, with its body."""
    words = str(error).partition(" -+-+- ")[0] or type(error).__name__
    body = getattr(error, "resp_body", None)
    return f"{words}: {body.decode(errors='replace')}" if body else words


def _cause(text: str) -> str:
    """What the server said, in the first line; a traceback below."""
    text = text.strip() or "no message"
    lines = text.splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith('  File "')]
    raised = [number for number, line in enumerate(lines) if frames and number > frames[-1] and line[:1].strip()]
    return f"the server raised {lines[raised[0]]}\n\n{text}" if raised else f"the server refused: {text}"
