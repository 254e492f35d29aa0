"""The promises of `steerlens`, one check each, numbered as in the design."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerlens.core import Controller, Law, Now, Signals, map_tensors, tensors_of
from steerlens.hosts import host_of
from steerlens.testing.case import (
    OTHER,
    Case,
    discover_hosts,
    padding,
    snapshot,
)


def check_fits_with_defaults(case: Case) -> None:
    """1. The method fits with defaults alone, and its controller steers."""
    assert case.controller.loops
    assert case.controller.recipe["method"] == case.method
    ids = torch.tensor([case.prompt])
    plain = case.logits(ids)
    with case.steer():
        steered = case.logits(ids)
    assert (steered - plain).abs().max() > 1e-4, "the controller changes nothing"


def check_equal_on_every_host(case: Case) -> None:
    """2. The same logits on every host, in float32 and in float64."""
    ids = torch.tensor([case.prompt])
    (*_, other) = (name for name in discover_hosts() if name != case.host and name not in case.declared.exceptions)
    # transformers computes RMS norms and rotary angles in float32 also in a float64 model; GPT-2 has neither
    for dtype, family in ((torch.float32, case.family), (torch.float64, "gpt2")):
        mine = case.other(dtype=dtype, family=family)
        reference = mine.other(host=other)
        with mine.steer():
            a = mine.logits(ids)
        with reference.steer():
            b = reference.logits(ids)
        mine.close(a, b, f"steered logits of {family} against {reference.host} in {dtype}")


def check_zero_is_no_steering(case: Case) -> None:
    """3. Factor 0 is bit-identical to no steering, with and without recording, and so is a method's own strength 0."""
    ids = torch.tensor([case.prompt])
    plain = case.logits(ids)
    with case.steer(controller=case.fit(strength=0.0)):
        assert torch.equal(case.logits(ids), plain), f"{case.method}(..., strength=0.0) changes the logits"
    for record in ("all", None):
        with case.steer(strength=0.0, record=record):
            assert torch.equal(case.logits(ids), plain), f"strength 0 changes the logits with record={record!r}"


def check_leaves_nothing_behind(case: Case) -> None:
    """4. After removal model, hooks, edits and hook table are what they were, also after errors; user hooks survive."""
    ids = torch.tensor([case.prompt])
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
    ids = torch.tensor([case.prompt])
    site = case.controller.sites[0]  # later ones also feel what was added before them
    plain = _activation(case, ids, site)
    with case.steer(record="all") as run:
        steered = _activation(case, ids, site)
        u = run.record[run.signals[site].total.get("u") or run.signals[site].own[0]["u"]]
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
        # those of steerlens are found by name; a method of one's own brings its laws
        laws = {type(loop.law) for loop in case.controller.loops}
        loaded = Controller.load(path, laws=[law for law in laws if not law.__module__.startswith("steerlens.")])
    _assert_same(case.controller, loaded, "the loaded controller")
    ids = torch.tensor([case.prompt])
    with case.steer():
        a = case.logits(ids)
    with case.steer(controller=loaded):
        b = case.logits(ids)
    assert torch.equal(a, b)


def check_cache_on_equals_off(case: Case) -> None:
    """8. With a KV cache and without: the same tokens, the same control at each of them."""
    ids = torch.tensor([case.prompt, case.prompt[::-1]])
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
    missing = len(case.prompt) - len(OTHER)
    long, short = torch.tensor([case.prompt]), torch.tensor([OTHER])
    for where in ("last", "all", slice(0, None), "prompt"):
        with case.steer(where=where, record="all") as run:
            alone = case.logits(short)
            own = run.record.copy()
            for side in ("left", "right"):
                row = [pad] * missing + OTHER if side == "left" else OTHER + [pad] * missing
                real = slice(missing, None) if side == "left" else slice(0, len(OTHER))
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
    """10. A half-precision model stays one, and its laws see and report float32."""
    for dtype in (torch.float16, torch.bfloat16):
        half = case.other(dtype=dtype)
        ids = torch.tensor([case.prompt])
        seen: set[torch.dtype] = set()
        loops = [loop.replace(law=_spy(loop.law, seen), where="all") for loop in case.controller.loops]
        with half.steer(controller=Controller(loops, case.controller.recipe), trust=True, record="all") as run:
            seen.clear()  # attaching tries laws in the dtype of their own tensors
            logits = half.logits(ids)
            record = {name: value.dtype for name, value in run.record.items()}
        assert logits.dtype == dtype
        assert seen == {torch.float32}, f"laws on a {dtype} model saw or gave {seen}"
        for name, found in record.items():
            expected = dtype if name.endswith("_u") else torch.float32
            assert found == expected, f"{name} is {found} on a {dtype} model"
        assert torch.isfinite(logits).all()


def check_composes_in_order(case: Case) -> None:
    """11. A sum of controllers steers as the nested contexts do, and they are removed in any order."""
    ids = torch.tensor([case.prompt])
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


def check_gradients_flow(case: Case) -> None:
    """15. Gradients flow through a steered pass, to the controller's tensors where they are asked for."""
    leaves: list[Tensor] = []
    ids = torch.tensor([case.prompt])  # found by steering, so not inside a run

    def track(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            tensor = tensor.detach().clone().requires_grad_()
            leaves.append(tensor)
        return tensor

    loops = [loop.replace(law=map_tensors(loop.law, track)) for loop in case.controller.loops]
    with torch.enable_grad(), case.steer(controller=Controller(loops, case.controller.recipe)):
        logits = case.logits(ids)
        loss = logits[0, -1].square().mean()
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else ()
    reached = any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    assert reached, "no gradient reaches the controller's tensors"
    assert all(gradient is None or torch.isfinite(gradient).all() for gradient in gradients)


def check_runs_on_a_server(case: Case, server: Case, *, exact: bool = True) -> None:
    """12. On a server without steerlens: the tokens and the record of the local run.

    Args:
        case: The method on a local nnsight model.
        server: The same model without weights, with `remote=`.
        exact: Equal to the last bit, or to rounding for a control before a block, which a server adds at other places;
            otherwise tokens are not compared, and records to bfloat16's accuracy.
    """
    share = 0.0 if exact else 0.1
    if exact and any(loop.act.point == "resid_pre" for loop in case.controller.loops):
        share = 1e-5
    ids = torch.tensor([case.prompt, case.prompt[::-1]])
    for where in (None, "all"):
        with case.steer(where=where, record="all") as run:
            tokens, expected = case.generate(ids), run.record.copy()
        with server.steer(controller=case.controller, where=where, record="all") as run:
            remote, record = server.generate(ids), run.record.copy()
        assert set(record) == set(expected), "the server recorded other signals"
        if exact:
            assert torch.equal(remote, tokens), f"other tokens on the server for where={where!r}"
        first = ids.shape[1]  # bfloat16 may choose another token, after which nothing is comparable
        for name, value in expected.items():
            theirs = record[name].to(value.dtype)
            theirs, value = (side if exact else side[:, :first] for side in (theirs, value))
            scale = float(value.nan_to_num().abs().max())
            error = float((theirs - value).nan_to_num().abs().max())
            assert error <= share * scale, f"{name} differs by {error:.2e} of {scale:.2e} for where={where!r}"
    assert "generate" not in vars(server.model), "a remote form is left behind"


def _activation(case: Case, ids: Tensor, site: Any) -> Tensor:
    """What a user sees at a site: through a TransformerLens cache or an nnsight trace."""
    host = host_of(case.model)
    if case.host != "nnsight":
        name = str(site)
        _, cache = case.model.run_with_cache(ids, names_filter=name)
        return cache[name].detach()
    tap = host.tap(site)  # type: ignore[attr-defined]
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
    ids = torch.tensor([case.prompt])
    with case.steer():
        case.logits(ids)
        raise RuntimeError("an error in the body")


def _spy(law: Law, seen: set[torch.dtype]) -> Law:
    """A law that does the same and notes the dtypes of states, controls and its own tensors."""

    class Spy(Law):
        signals, vectors = law.signals, law.vectors

        def __init__(self) -> None:
            self.law = law

        def act(self, x: Tensor, now: Now) -> tuple[Tensor, Signals]:
            seen.add(x.dtype)
            seen.update(tensor.dtype for tensor in tensors_of(self.law) if tensor.is_floating_point())
            u, signals = self.law.act(x, now)
            seen.add(u.dtype)
            return u, signals

    return Spy()


def _failing(controller: Controller) -> Controller:
    class Failing(Law):
        def act(self, x: Tensor, now: Now) -> tuple[Tensor, Signals]:
            if x.any():  # steer() tries a law on a zero state
                raise RuntimeError("the law fails on purpose")
            return torch.zeros_like(x), {}

    return Controller([loop.replace(law=Failing(), where="all") for loop in controller.loops], controller.recipe)


def _assert_raises(call: Callable[[], Any], words: str) -> None:
    message = None
    try:
        call()
    except RuntimeError as error:
        message = str(error)
    assert words in (message or "no error"), f"expected an error with the words {words!r}, got {message!r}"


def _assert_same(a: Controller, b: Controller, what: str) -> None:
    assert [repr(loop) for loop in a.loops] == [repr(loop) for loop in b.loops], f"{what} has other loops"
    assert a.recipe == b.recipe, f"{what} has another recipe"
    for x, y in zip(*(tensors_of([loop.parts for loop in side.loops]) for side in (a, b)), strict=True):
        assert x.dtype == y.dtype, f"{what} has other dtypes"
        assert torch.equal(x, y), f"{what} has other tensors"
