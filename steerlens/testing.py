"""The conformance suite: what every method promises on every host, as checks that anyone can run.

    for check in checks():
        check(Case("caa", "bridge"))

A method declares in its file what it cannot promise, and why: `EXCEPTIONS = {"check_name": "words of the error"}`. The
suite asserts that the check then really fails, with these words.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerlens import methods
from steerlens.contrast import Pairs
from steerlens.core import Controller, Law, Record, map_tensors, tensors_of
from steerlens.hosts import host_of
from steerlens.models import tiny
from steerlens.steering import Run, steer

HOSTS = ("bridge", "hooked", "nnsight")

#: Token ids below the tiny models' vocabulary; the last tokens differ, so that layer 0 has a direction too.
_POSITIVE = [[5, 9, 12, 31], [5, 14, 7, 22, 33], [8, 9, 41, 35]]
_NEGATIVE = [[5, 9, 13, 40], [5, 15, 7, 23, 44], [8, 10, 41, 46]]
_PROMPT = [3, 17, 25, 29, 41, 22, 9]
_OTHER = [7, 30, 31, 32, 33]


def discover_methods() -> dict[str, Callable[..., Controller]]:
    """Every method: in each file of `steerlens.methods`, the function named like the file."""
    found: dict[str, Callable[..., Controller]] = {}
    for entry in pkgutil.iter_modules(methods.__path__):
        module = importlib.import_module(f"steerlens.methods.{entry.name}")
        function = getattr(module, entry.name, None)
        if inspect.isfunction(function):
            found[entry.name] = function
    return found


def discover_hosts() -> list[str]:
    """The hosts whose library is installed."""
    hosts = []
    if importlib.util.find_spec("transformer_lens"):
        hosts.append("bridge")
        try:
            from transformer_lens import HookedTransformer  # noqa: F401
        except ImportError:  # TransformerLens 4
            pass
        else:
            hosts.append("hooked")
    if importlib.util.find_spec("nnsight"):
        hosts.append("nnsight")
    return hosts


def exceptions(method: str) -> dict[str, str]:
    """What a method declares that it cannot promise: check name to words of the error."""
    return getattr(importlib.import_module(f"steerlens.methods.{method}"), "EXCEPTIONS", {})


class Case:
    """A method on a host, with a tiny random model of its own.

    Args:
        method: Name of the method.
        host: One of `discover_hosts()`.
        family: `"llama"`, `"gemma"` or `"gpt2"`.
        dtype, device: Of the model.
        model: A model to use instead of a tiny one; `other` then is not available.
    """

    def __init__(
        self,
        method: str,
        host: str,
        *,
        family: str = "llama",
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        model: Any = None,
    ):
        self.method, self.host, self.family, self.dtype, self.device = method, host, family, dtype, device
        if model is not None:
            self.model = model

    def other(self, **changes: Any) -> Case:
        """The same case with another host, family, dtype or device."""
        fields: dict[str, Any] = {"host": self.host, "family": self.family, "dtype": self.dtype, "device": self.device}
        return Case(self.method, **(fields | changes))

    @cached_property
    def model(self) -> Any:
        """The tiny model on this host; the weights are the same on all."""
        return tiny(self.family, host=self.host, dtype=self.dtype, device=self.device)

    @cached_property
    def data(self) -> Pairs:
        """Contrast texts as token ids, the same on every host."""
        return Pairs(_POSITIVE, _NEGATIVE)

    def fit(self, **options: Any) -> Controller:
        """Fit the method with its defaults."""
        function = discover_methods()[self.method]
        if "progress" in inspect.signature(function).parameters:
            options.setdefault("progress", False)
        return function(self.model, self.data, **options)

    @cached_property
    def controller(self) -> Controller:
        """The method fitted with its defaults."""
        return self.fit()

    def logits(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits of one forward pass `[batch pos vocab]`."""
        ids = ids.to(self.device)
        mask = torch.ones_like(ids) if mask is None else mask.to(self.device)
        if self.host == "nnsight":
            with self.model.trace({"input_ids": ids, "attention_mask": mask}):
                logits = self.model.output.logits.save()
            return logits  # noqa: RET504 (bound by the trace)
        return self.model(ids, attention_mask=mask)

    def generate(self, ids: Tensor, count: int = 6, *, cache: bool = True) -> Tensor:
        """Greedy continuation of unpadded prompts, `[batch pos+count]`."""
        ids = ids.to(self.device)
        if self.host == "nnsight":
            options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "use_cache": cache}
            with self.model.generate(ids, **options) as tracer:
                tokens = tracer.result.save()
            return tokens  # noqa: RET504 (bound by the trace)
        return self.model.generate(
            ids, max_new_tokens=count, do_sample=False, stop_at_eos=False, use_past_kv_cache=cache, verbose=False
        )

    def steer(self, **options: Any) -> Run:
        """Attach the fitted controller."""
        return steer(self.model, options.pop("controller", self.controller), **options)

    @property
    def tolerance(self) -> float:
        """Largest difference that rounding explains, relative to the logits' scale."""
        return 1e-10 if self.dtype == torch.float64 else 1e-5

    def close(self, a: Tensor, b: Tensor, what: str, factor: float = 1.0) -> None:
        """Asserts equality up to rounding."""
        scale = max(1.0, float(b.detach().abs().max()))
        difference = float((a.detach() - b.detach().to(a)).abs().max())
        assert difference <= factor * self.tolerance * scale, f"{what} differs by {difference:.2e} (scale {scale:.1f})"

    def __repr__(self) -> str:
        return f"{self.method}-{self.host}-{self.family}-{str(self.dtype).removeprefix('torch.')}"


def checks() -> list[Callable[[Case], None]]:
    """All checks, in the order of the promises."""
    return [function for name, function in globals().items() if name.startswith("check_")]


def run_check(check: Callable[[Case], None], case: Case) -> None:
    """Run a check, or assert that a declared exception really fails with its message."""
    declared = exceptions(case.method).get(check.__name__)
    if declared is None:
        return check(case)
    said = None
    try:
        check(case)
    except Exception as error:
        said = str(error)
    assert said is not None, f"{case!r} declares that {check.__name__} fails ({declared!r}), but it passes"
    assert declared in said, f"{case!r} declares {declared!r} for {check.__name__}, it failed with {said!r}"
    return None


# -- promises ---------------------------------------------------------------------------------------------------


def check_fits_with_defaults(case: Case) -> None:
    """1. The method fits with defaults alone, and its controller steers."""
    assert case.controller.loops
    assert case.controller.recipe["method"] == case.method
    ids = torch.tensor([_PROMPT])
    plain = case.logits(ids)
    with case.steer():
        steered = case.logits(ids)
    assert (steered - plain).abs().max() > 1e-4, "the controller changes nothing"


def check_equal_on_every_host(case: Case) -> None:
    """2. The same logits on every host, in float32 and in float64."""
    ids = torch.tensor([_PROMPT])
    # transformers computes RMS norms and rotary angles in float32 also in a float64 model; GPT-2 has neither
    for dtype, family in ((torch.float32, case.family), (torch.float64, "gpt2")):
        mine = case.other(dtype=dtype, family=family)
        reference = mine.other(host=discover_hosts()[-1])
        with mine.steer():
            a = mine.logits(ids)
        with reference.steer():
            b = reference.logits(ids)
        mine.close(a, b, f"steered logits of {family} against {reference.host} in {dtype}")


def check_zero_is_no_steering(case: Case) -> None:
    """3. Factor 0 is bit-identical to no steering, with and without recording."""
    ids = torch.tensor([_PROMPT])
    plain = case.logits(ids)
    for record in ("all", None):
        with case.steer(strength=0.0, record=record):
            assert torch.equal(case.logits(ids), plain), f"strength 0 changes the logits with record={record!r}"


def check_leaves_nothing_behind(case: Case) -> None:
    """4. After removal model, hooks, edits and hook table are what they were, also after errors; user hooks survive."""
    ids = torch.tensor([_PROMPT])
    plain = case.logits(ids)
    with _user_hook(case) as calls:
        before = snapshot(case.model)
        with case.steer():
            case.logits(ids)
            assert snapshot(case.model) != before
        assert snapshot(case.model) == before
        _assert_raises(lambda: _raise_inside(case), "an error in the body")
        assert snapshot(case.model) == before, "an error in the body leaves something behind"
        run = case.steer(controller=_failing(case.controller))
        try:
            _assert_raises(lambda: case.logits(ids), "the law fails on purpose")
        finally:
            run.remove()
        assert snapshot(case.model) == before, "an error in a law leaves something behind"
        first, second = case.steer(), case.steer(strength=0.5)
        case.logits(ids)
        first.remove()
        case.logits(ids)
        second.remove()
        second.remove()
        assert snapshot(case.model) == before, "removal out of order leaves something behind"
        count = len(calls)
        assert torch.equal(case.logits(ids), plain)
        assert len(calls) == count + 1, "the user's own hook is gone"


def check_record_is_what_was_added(case: Case) -> None:
    """5. What the site holds minus what it would have held equals the recorded control."""
    ids = torch.tensor([_PROMPT])
    site = case.controller.sites[0]  # later ones also feel what was added before them
    plain = _activation(case, ids, site)
    with case.steer(record="all") as run:
        steered = _activation(case, ids, site)
        u = run.record[run._pass.names[site].total.get("u") or run._pass.names[site].own[0]["u"]]
    scale = float(u.abs().max())
    assert scale > 0, "no control was recorded"
    case.close(steered - plain, u, f"u at {site}", factor=max(1.0, float(plain.abs().max()) / max(1.0, scale)) * 3)


def check_same_seed_same_controller(case: Case) -> None:
    """6. Fitting twice gives the same tensors."""
    _assert_same(case.controller, case.fit(), "a second fit")


def check_saves_and_loads(case: Case) -> None:
    """7. A saved and loaded controller has the same bits and steers alike."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "controller.safetensors"
        case.controller.save(path)
        loaded = Controller.load(path)
    _assert_same(case.controller, loaded, "the loaded controller")
    ids = torch.tensor([_PROMPT])
    with case.steer():
        a = case.logits(ids)
    with case.steer(controller=loaded):
        b = case.logits(ids)
    assert torch.equal(a, b)


def check_cache_on_equals_off(case: Case) -> None:
    """8. With a KV cache and without: the same tokens, the same control at each of them."""
    ids = torch.tensor([_PROMPT, _PROMPT[::-1]])
    for where in (None, "all", "generated", slice(2, 9)):
        with case.steer(where=where, record="all") as run:
            on = case.generate(ids)
            recorded = run.record.copy()
            off = case.generate(ids, cache=False)
            assert torch.equal(on, off), f"tokens differ for where={where!r}"
            assert set(recorded) == set(run.record)
            for name, value in recorded.items():
                other = run.record[name]
                assert torch.equal(value.isnan(), other.isnan()), f"{name}: other tokens steered for where={where!r}"
                case.close(value.nan_to_num(), other.nan_to_num(), f"{name} for where={where!r}", factor=10)
        assert recorded, "nothing was recorded"
        assert next(iter(recorded.values())).shape[1] == on.shape[1] - 1


def check_batch_row_equals_row_alone(case: Case) -> None:
    """9. A row in a padded batch, left or right, is steered as it is alone; pads are never written."""
    pad = case.model.tokenizer.pad_token_id
    missing = len(_PROMPT) - len(_OTHER)
    long, short = torch.tensor([_PROMPT]), torch.tensor([_OTHER])
    for where in ("last", "all", slice(0, None), "prompt"):
        with case.steer(where=where, record="all") as run:
            alone = case.logits(short)
            own = run.record.copy()
            for side in ("left", "right"):
                row = [pad] * missing + _OTHER if side == "left" else _OTHER + [pad] * missing
                real = slice(missing, None) if side == "left" else slice(0, len(_OTHER))
                ids = torch.tensor([row, long[0].tolist()])
                mask = torch.ones_like(ids)
                mask[0] = 0
                mask[0, real] = 1
                with padding(case.model, side):
                    logits = case.logits(ids, mask)
                what = f"{side} padding, where={where!r}"
                case.close(logits[:1, real], alone, f"logits with {what}", factor=3)
                for name, value in own.items():
                    case.close(
                        run.record[name][:1, real].nan_to_num(), value.nan_to_num(), f"{name} with {what}", factor=10
                    )
                    pads = run.record[name][0][mask[0] == 0]
                    blank = pads.isnan() | (pads == 0)
                    assert bool(blank.all()), f"{name} was written at a pad with {what}"


def check_dtype_is_kept(case: Case) -> None:
    """10. A half-precision model stays one, and its laws compute in float32."""
    for dtype in (torch.float16, torch.bfloat16):
        half = case.other(dtype=dtype)
        ids = torch.tensor([_PROMPT])
        with half.steer(controller=case.controller, trust=True, record="all") as run:
            logits = half.logits(ids)
            states = [run.record[name] for name in run.record if name.endswith("steer_u")]
        assert logits.dtype == dtype
        assert all(u.dtype == dtype for u in states)
        assert torch.isfinite(logits).all()


def check_composes_in_order(case: Case) -> None:
    """11. A sum of controllers steers as the nested contexts do, and they come off in any order."""
    ids = torch.tensor([_PROMPT])
    a, b = case.controller, case.controller * 0.5
    plain = case.logits(ids)
    with case.steer(controller=a):
        only_a = case.logits(ids)
        with case.steer(controller=b):
            nested = case.logits(ids)
    with case.steer(controller=a + b):
        case.close(case.logits(ids), nested, "the sum of two controllers", factor=3)
    first, second = case.steer(controller=b), case.steer(controller=a)
    first.remove()
    case.close(case.logits(ids), only_a, "the controller that is left", factor=3)
    second.remove()
    assert torch.equal(case.logits(ids), plain)


def check_signals_are_recorded(case: Case) -> None:
    """13. Every signal that a loop's law and the method's docstring name is recorded with its shape."""
    document = inspect.getdoc(discover_methods()[case.method]) or ""
    ids = torch.tensor([_PROMPT, _PROMPT[::-1]])
    with case.steer(record="all") as run:
        case.logits(ids)
    for site, names in run._pass.names.items():
        for loop_names in names.own:
            for signal, name in loop_names.items():
                assert f"`{signal}`" in document, f"the docstring of {case.method} does not name the signal {signal}"
                assert run.record[name].shape[:2] == ids.shape, f"{name} has shape {tuple(run.record[name].shape)}"
            assert run.record[loop_names["u"]].shape == (*ids.shape, *host_of(case.model).shape(site))


def check_docstring(case: Case) -> None:
    """14. The docstring carries an equation, shapes or units, what is raised, the signals and the source."""
    document = inspect.getdoc(discover_methods()[case.method]) or ""
    for needed in (" = ", "Args:", "Returns:", "Raises:", "Recorded signals:", "Source:", "arXiv"):
        assert needed in document, f"the docstring of {case.method} lacks {needed!r}"


def check_gradients_flow(case: Case) -> None:
    """15. Gradients flow through a steered pass, to the controller's tensors where they are asked for."""
    leaves: list[Tensor] = []

    def track(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            tensor = tensor.detach().clone().requires_grad_()
            leaves.append(tensor)
        return tensor

    loops = [loop.replace(law=map_tensors(loop.law, track)) for loop in case.controller.loops]
    with torch.enable_grad(), case.steer(controller=Controller(loops, case.controller.recipe)):
        logits = case.logits(torch.tensor([_PROMPT]))
        loss = logits[0, -1].square().mean()
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    assert all(gradient is None or torch.isfinite(gradient).all() for gradient in gradients)


# -- tools ------------------------------------------------------------------------------------------------------


def snapshot(model: Any) -> dict[str, Any]:
    """Everything that steering could leave behind on a model: weights, hooks of all kinds, hook names, edits."""
    module = getattr(model, "_module", model)
    table = getattr(model, "_hook_registry", None)
    points = table if table is not None else getattr(model, "hook_dict", {})
    return {
        "weights": {name: (value.data_ptr(), value._version) for name, value in module.state_dict().items()},
        "torch hooks": {
            name: (len(part._forward_hooks), len(part._forward_pre_hooks), len(part._backward_hooks))
            for name, part in module.named_modules()
        },
        "lens hooks": {name: (len(point.fwd_hooks), len(point.bwd_hooks)) for name, point in points.items()},
        "table": sorted(getattr(model, "mod_dict", {})) if table is None else sorted(table),
        "edits": [id(edit) for edit in getattr(model, "_edits", [])],
        "attributes": sorted(vars(model)),
    }


@contextmanager
def padding(model: Any, side: str) -> Iterator[None]:
    """Let the tokenizer pad on one side: HookedTransformer asks it which mask it needs."""
    before = model.tokenizer.padding_side
    model.tokenizer.padding_side = side
    try:
        yield
    finally:
        model.tokenizer.padding_side = before


def _activation(case: Case, ids: Tensor, site: Any) -> Tensor:
    """What a user sees at a site: through a TransformerLens cache or an nnsight trace."""
    host = host_of(case.model)
    if case.host != "nnsight":
        name = str(site)
        _, cache = case.model.run_with_cache(ids, names_filter=lambda candidate: "steer" not in candidate)
        return cache[name].detach()
    tap = host._tap(site)  # type: ignore[attr-defined]
    with case.model.trace({"input_ids": ids, "attention_mask": torch.ones_like(ids)}):
        value = tap.value().save()
    return value.detach()


@contextmanager
def _user_hook(case: Case) -> Iterator[list[int]]:
    """A hook or edit of the user's own, which counts its calls."""
    calls: list[int] = []
    if case.host == "nnsight":
        model = case.model
        layer = host_of(model).layers[0]  # type: ignore[attr-defined]
        with model.edit(inplace=True):
            calls.append(layer.output.shape[0])
        try:
            yield calls
        finally:
            model.clear_edits()
    else:
        point = case.model.hook_dict["blocks.0.hook_resid_post"]
        point.add_hook(lambda x, hook: calls.append(x.shape[0]), is_permanent=True)
        try:
            yield calls
        finally:
            case.model.reset_hooks(including_permanent=True)


def _raise_inside(case: Case) -> None:
    with case.steer():
        case.logits(torch.tensor([_PROMPT]))
        raise RuntimeError("an error in the body")


def _failing(controller: Controller) -> Controller:
    class Failing(Law):
        def act(self, x: Tensor, memory: Any) -> Any:
            if x.any():  # steer() tries a law on a zero state
                raise RuntimeError("the law fails on purpose")
            return torch.zeros_like(x), {}

    return Controller([loop.replace(law=Failing()) for loop in controller.loops], controller.recipe)


def _assert_raises(call: Callable[[], Any], words: str) -> None:
    said = None
    try:
        call()
    except RuntimeError as error:
        said = str(error)
    assert words in (said or "no error"), f"expected an error with the words {words!r}, got {said!r}"


def _assert_same(a: Controller, b: Controller, what: str) -> None:
    assert [repr(loop) for loop in a.loops] == [repr(loop) for loop in b.loops], f"{what} has other loops"
    assert a.recipe == b.recipe, f"{what} has another recipe"
    for x, y in zip(*(tensors_of([loop.law for loop in side.loops]) for side in (a, b)), strict=True):
        assert x.dtype == y.dtype, f"{what} has other dtypes"
        assert torch.equal(x, y), f"{what} has other tensors"


__all__ = ["Case", "Record", "checks", "discover_hosts", "discover_methods", "padding", "run_check", "snapshot"]
