"""nnsight's remote execution under steering: how the record comes back, and what may not be sent."""

from __future__ import annotations

import ast
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import nnsight
from nnsight.intervention.backends.remote import RemoteBackend, RemoteError
from nnsight.tracing.tracer import WithBlockNotFoundError

from steerlens.core import Pass

# nnsight sends an installed package by reference, and a server does not have this one
nnsight.register("steerlens")

_RECORD = "steerlens_record_{}"


class RemoteForms:
    """Stands on a model while it is steered: lets remote calls bring the records of its runs back.

    nnsight returns what the user's own block saves, never what an edit saves. So the block that is sent gets one more
    statement, in front, that saves the records which the edits fill. And `model.generate(..., remote=True)` without a
    `with`, which nnsight would run on local weights, is given a block.
    """

    def __init__(self, model: Any):
        self.model = model
        self.runs: list[Pass] = []
        self.limits: list[int] = []
        self.payload_bytes: int | None = None

    @classmethod
    def enter(cls, model: Any, run: Pass, limit: int) -> RemoteForms:
        """Add a run to the forms of a model, installing them for the first."""
        generate = model.__dict__.get("generate")
        forms = generate.forms if isinstance(generate, _Generate) else cls(model)
        if not forms.runs:
            model.__dict__["generate"] = _Generate(forms)
            model.__dict__["_remote_backend"] = _MakeBackend(forms)
        forms.runs.append(run)
        forms.limits.append(limit)
        return forms

    def leave(self, run: Pass) -> None:
        """Take a run off; the last one takes the forms off the model."""
        if run not in self.runs:
            return
        index = self.runs.index(run)
        del self.runs[index], self.limits[index]
        if not self.runs:
            for name in ("generate", "_remote_backend"):
                self.model.__dict__.pop(name, None)


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
        tracer = model.trace(*args, fn=function, **kwargs)
        try:
            tracer.capture()  # looks for a `with` two frames up: in the caller of this method
        except WithBlockNotFoundError:
            if not kwargs.get("remote"):
                return model.interleave(function, *args, **kwargs)
            return _generate_in_a_block(model, args, kwargs)
        return tracer


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
        backend = SteeredBackend.__new__(SteeredBackend)
        backend.__dict__.update(plain.__dict__)
        backend.forms = self.forms
        return backend


class SteeredBackend(RemoteBackend):
    """A remote backend that sends the records along, and puts what comes back into the runs."""

    forms: RemoteForms

    def _serialize(self, tracer: Any) -> bytes:
        blob = super()._serialize(tracer)
        self.forms.payload_bytes = len(blob)
        limit = min(self.forms.limits)
        if len(blob) > limit:
            raise ValueError(
                f"the request has {len(blob) / 1e6:.1f} MB, the limit is {limit / 1e6:.1f} MB; send gains without full "
                "matrices (full_gain=False), or raise payload_limit"
            )
        return blob

    def request(self, request: Any, tracer: Any) -> Any:
        """As nnsight's, with one statement more in the block."""
        frame, node = tracer.info.frame, tracer.node
        logs = {_RECORD.format(index): run.log.pieces for index, run in enumerate(self.forms.runs) if run.record}
        tracer.node = _with_saves(node, list(logs))
        tracer.info.frame = SimpleNamespace(
            f_locals={**frame.f_locals, **{f"{name}_": log for name, log in logs.items()}},
            f_globals=frame.f_globals,
            f_code=frame.f_code,
        )
        try:
            result = super().request(request, tracer)
        except RemoteError as error:
            raise RemoteError(_cause(str(error))) from error
        except (OSError, EOFError) as error:
            raise ConnectionError(f"the NDIF server at {self.host} cannot be reached: {error}") from error
        finally:
            tracer.node, tracer.info.frame = node, frame
        for name, log in logs.items():
            returned = result.pop(name, None) if isinstance(result, dict) else None
            if returned is not None:
                log.clear()
                log.update(returned)
        return result


def _with_saves(node: Any, names: list[str]) -> Any:
    """The traced block with `name = nnsight.save(name_)` in front; the block itself is shared and stays as it is."""
    first = node.body[0].lineno
    statements = ast.parse("\n".join(f"{name} = __import__('nnsight').save({name}_)" for name in names)).body
    for statement in statements:
        ast.increment_lineno(statement, max(1, first - len(names)) - statement.lineno)
    copy = ast.With(items=node.items, body=[*statements, *node.body])
    return ast.copy_location(copy, node)


def _cause(text: str) -> str:
    """The server's traceback with its last line first."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    last = lines[-1].strip() if lines else "no message"
    return f"the server raised {last}\n\n{text.strip()}" if len(lines) > 1 else f"the server refused: {last}"
