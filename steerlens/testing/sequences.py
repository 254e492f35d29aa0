"""The promises about sequences: what is scored is what was generated, lists of prompts, dtypes inside laws, threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from steerlens.core import Controller, Law, tensors_of
from steerlens.models import tiny
from steerlens.testing.case import OTHER, Case, padding


def check_scored_equals_generated(case: Case) -> None:
    """16. A greedy continuation, teacher forced with its prompt's length, has the log-probabilities it had before."""
    long, short, count = case.prompt, OTHER, 5
    for where in (None, "all", "generated"):
        rows, wanted = [], []
        with case.steer(where=where) as run:
            for prompt in (long, short):
                text = case.generate(torch.tensor([prompt]), count)[0].tolist()
                rows.append(text)
                wanted.append(_stepwise(case, prompt, text))
            alone = [_scores(case, run, [text], len(text) - count, "right")[0] for text in rows]
            padded = {side: _scores(case, run, rows, [len(long), len(short)], side) for side in ("left", "right")}
        for row in range(2):
            case.close(alone[row], wanted[row], f"scores of row {row} alone, where={where!r}", factor=10)
            for side, found in padded.items():
                case.close(found[row], wanted[row], f"scores of row {row}, {side} padding, where={where!r}", factor=10)


def check_laws_see_float32(case: Case) -> None:
    """17. Laws see float32 states, and hold float32 tensors, also in a half-precision model."""
    wide = torch.float32
    for dtype in (torch.float16, torch.bfloat16):
        mine = case.other(dtype=dtype)
        seen: list[Any] = []

        class Looking(Law):
            def __init__(self, law: Law):
                self.law = law

            @property
            def signals(self) -> tuple[str, ...]:  # type: ignore[override]
                return self.law.signals

            @property
            def vectors(self) -> tuple[str, ...]:  # type: ignore[override]
                return self.law.vectors

            def act(self, x: Tensor, now: Any, seen: list[Any] = seen) -> Any:
                seen.append((x.dtype, {tensor.dtype for tensor in tensors_of(self.law) if tensor.is_floating_point()}))
                return self.law.act(x, now)

        loops = [loop.replace(law=Looking(loop.law)) for loop in case.controller.loops]
        with mine.steer(controller=Controller(loops, case.controller.recipe), trust=True, where="all"):
            seen.clear()
            mine.logits(torch.tensor([case.prompt]))
        assert seen, "no law was called"
        for state, tensors in seen:
            assert state == wide, f"a law of a {dtype} model sees {state}"
            assert tensors <= {wide}, f"a law of a {dtype} model holds {tensors}"


def check_list_of_prompts(case: Case) -> None:
    """18. A list of prompts gives each row what it gives alone, as the library itself pads it."""
    texts = [OTHER, case.prompt, OTHER[:3]]
    words = [" ".join(f"w{token}" for token in text) for text in texts]
    for where in ("last", "all"):
        with torch.no_grad(), padding(case.model, "right"), case.steer(where=where):
            alone = [_of_text(case, [each])[0] for each in words]
            together = _of_text(case, words)
        for row, text in enumerate(texts):
            case.close(
                together[row, : len(text)], alone[row], f"row {row} of a list of prompts, where={where!r}", factor=10
            )


def check_threads(case: Case) -> None:
    """19. Threads that fit and steer, a model each, give the serial numbers."""
    if case.family != "llama":
        return  # what threads share does not depend on the family, and a fit in two threads takes its time twice
    cases = [case.other(model=tiny(case.family, host=case.host, seed=seed)) for seed in range(2)]
    ids = torch.tensor([case.prompt])

    def work(mine: Case) -> list[Tensor]:
        controller = mine.fit()
        with mine.steer(controller=controller):
            return [*tensors_of([loop.parts for loop in controller.loops]), mine.logits(ids)]

    wanted = [work(mine) for mine in cases]
    for got, expected in zip(together(*(partial(work, mine) for mine in cases)), wanted, strict=True):
        if isinstance(got, BaseException):
            raise got
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b), "two threads give other numbers than one after the other"


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Results of functions that run at the same time, each in a thread of its own, or what they raised."""
    results: list[Any] = [None] * len(calls)
    barrier = threading.Barrier(len(calls))

    def work(index: int) -> None:
        barrier.wait(timeout=60)
        try:
            results[index] = calls[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=600)
    return results


def _stepwise(case: Case, prompt: list[int], text: list[int]) -> Tensor:
    """Log-probabilities of a continuation, each seen in a generation of one token more."""
    if case.host == "nnsight":
        options = {"max_new_tokens": len(text) - len(prompt), "min_new_tokens": len(text) - len(prompt)}
        options |= {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        with case.model.generate(torch.tensor([prompt]), **options) as tracer:
            out = tracer.result.save()
        steps = [step[0] for step in out.logits]
    else:
        steps = []
        caught: list[Tensor] = []
        point = case.model.hook_dict["ln_final.hook_normalized"]
        point.add_hook(lambda x, hook: caught.append(x[0, -1].detach().clone()))
        try:
            again = case.generate(torch.tensor([prompt]), len(text) - len(prompt))[0].tolist()
        finally:
            point.remove_hooks()
        assert again == text
        with torch.no_grad():
            steps = [case.model.unembed(x[None, None])[0, 0] for x in caught]
        cap = getattr(case.model.cfg, "output_logits_soft_cap", None) or 0.0
        if cap > 0:  # which Gemma applies behind the unembedding
            steps = [cap * (step / cap).tanh() for step in steps]
    targets = text[len(prompt) :]
    found = [step.detach().float().log_softmax(-1)[token] for step, token in zip(steps, targets, strict=True)]
    return torch.stack(found)


def _scores(case: Case, run: Any, rows: list[list[int]], lengths: Any, side: str) -> list[Tensor]:
    """Log-probabilities of the tokens after each row's prompt, in one padded pass."""
    longest = max(map(len, rows))
    ends = [lengths] if isinstance(lengths, int) else list(lengths)
    ids = torch.full((len(rows), longest), case.model.tokenizer.pad_token_id)
    mask, starts = torch.zeros_like(ids), []
    for row, text in enumerate(rows):
        start = longest - len(text) if side == "left" else 0
        ids[row, start : start + len(text)] = torch.tensor(text)
        mask[row, start : start + len(text)] = 1
        starts.append(start)
    with padding(case.model, side), run.scoring(lengths):
        logits = case.logits(ids, mask).detach().float().log_softmax(-1)
    found = []
    for row, text in enumerate(rows):
        places = range(ends[row], len(text))
        found.append(torch.stack([logits[row, starts[row] + t - 1, text[t]] for t in places]))
    return found


def _of_text(case: Case, texts: list[str]) -> Tensor:
    if case.host != "nnsight":
        return case.model(texts).detach()
    with case.model.trace(texts):
        logits = case.model.output.logits.save()
    return logits.detach()
