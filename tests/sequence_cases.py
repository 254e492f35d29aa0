"""Random steered sequences, how each library runs them, and their comparison with the reference."""

from __future__ import annotations

import random
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import steerlens as sl
from steerlens.core import POINTS, Gate
from steerlens.models import tiny
from steerlens.testing import padding
from tests.reference import SPANS, Above, Layered, Pull, Push, Reference, Running

PAD, EOS, WORDS = 97, 99, 97
NAMES = ("last", "last_prompt", "generated", "prompt", "all")
#: Widths of the tiny models, by point; what is not listed has the width of the residual stream.
WIDTHS = {"z": 8, "mlp_post": {"llama": 64, "gemma": 64, "gpt2": 128}}


@cache
def spans() -> list[Any]:
    """Parts of texts of the tiny models, and what they are by a search in the decoded text."""
    model = tiny(host="bridge")

    def name(span: Any, start: str | None, end: str | None, inclusive: bool = True) -> Any:
        SPANS[span.words] = partial(found, model.tokenizer, start, end, inclusive)
        return span

    return [
        name(sl.after(model, "w1"), "w1", None),
        name(sl.after(model, "3 w", inclusive=False), "3 w", None, False),
        name(sl.until(model, "w4"), None, "w4"),
        name(sl.between(model, "w2", "w"), "w2", "w"),
        name(sl.between(model, "w", "5", inclusive=False), "w", "5", False),
        name(sl.between(model, "6 w", "w7"), "6 w", "w7"),
    ]


def found(tokenizer: Any, start: str | None, end: str | None, inclusive: bool, tokens: Any) -> bool:
    """Whether the last of some tokens lies between two markers of the text that they decode to."""
    inside, place, marks = start is None, 0, [start, end]
    for length in range(1, len(tokens) + 1):
        text, entered = tokenizer.decode(tokens[:length]), False
        while True:
            marker = marks[int(inside)]
            at = -1 if marker is None else text.find(marker, place)
            if at < 0:
                break
            place, inside = at + len(marker), not inside
            entered = inside
            if start is None:
                marks = [None, None]
    return inside and (inclusive or not entered)


class Draw(random.Random):
    """Random texts, controllers and options; the same seed draws the same."""

    def unit(self, width: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.randrange(1 << 30))
        vector = torch.randn(width, generator=generator)
        return vector / vector.norm()

    def text(self, low: int = 1, high: int = 9) -> list[int]:
        return [self.randrange(WORDS) for _ in range(self.randint(low, high))]

    def where(self, *, batch: int | None = None) -> Any:
        kind = self.randrange(10)
        if kind > 7:
            return self.choice(spans())
        if kind < 5:
            return NAMES[kind]
        if kind == 5:
            low, high = self.randint(-4, 6), self.choice([None, self.randint(3, 12)])
            return slice(self.choice([None, low]), high)
        if kind == 6:
            rows = [[self.random() < 0.5 for _ in range(14)] for _ in range(batch or 1)]
            return torch.tensor(rows if batch else rows[0])
        modulus, rest = self.randint(2, 3), self.randint(0, 1)
        return lambda positions: positions % modulus == rest

    def law(self, family: str, point: str, name: str, *, memory: bool) -> Any:
        width = WIDTHS.get(point, 32)
        v = self.unit(width[family] if isinstance(width, dict) else width)
        # the sum over layers is one number a token, so it is kept for points of one shape
        kinds = ["push", "pull"] + ["layered"] * (point != "z") + ["running"] * (memory and point != "z")
        kind = self.choice(kinds)
        gain, level = self.uniform(0.2, 0.9), self.uniform(-3, 3)
        if kind == "push":
            return Push(3 * v)
        if kind == "running":
            return Running(v, 3 * gain, level, name)
        return (Pull if kind == "pull" else Layered)(v, gain, level)

    def controller(self, family: str, *, batch: int | None = None, memory: bool = False) -> sl.Controller:
        """One to three loops at any points, perhaps gated, perhaps under a schedule."""
        where = self.where(batch=batch)
        loops = []
        for index in range(self.randint(1, 3)):
            point = self.choice(POINTS + ("resid_post", "resid_pre") * 2)
            site = sl.Site(self.randrange(4), point)
            law = self.law(family, point, f"loop{index}", memory=memory)
            sense = None
            if point == "resid_post" and site.layer and self.random() < 0.3:
                sense = sl.Site(self.randrange(site.layer), "resid_post")
            loops.append(sl.Loop(law, site, sense, where=where, strength=self.choice([1.0, 0.5, -1.0])))
        controller = sl.Controller(loops)
        if self.random() < 0.4:
            site = sl.Site(self.randrange(4), self.choice(["resid_post", "resid_pre", "resid_mid"]))
            pool = self.choice(["mean", "rms"])
            summary = sl.Summary(site, pool, self.choice(["prompt", "last_prompt"]))
            made = Gate(Above(self.unit(32), 0.0 if pool == "mean" else 0.1), [summary])
            controller = sl.when(controller, ~made if self.random() < 0.3 else made)
        if where not in ("prompt", "last_prompt") and self.random() < 0.3:
            factors = [self.uniform(0, 1.5) for _ in range(self.randint(1, 4))]
            controller = sl.schedule(controller, factors, prompt=self.choice([1.0, 0.3]))
        if self.random() < 0.3:
            # it reads what the residual stream is before the first loop, or where that acts
            first = min(loop.act for loop in loops)
            site = first if first.point.startswith("resid") else sl.Site(first.layer, "resid_pre")
            v, slope = self.unit(32), self.uniform(-0.5, 0.5)
            made = Gate(sl.Ramp(v, torch.tensor(0.2), slope, 0.5, 0.0, 1.5), [sl.Summary(site)])
            controller = sl.when(controller, ~made if self.random() < 0.3 else made, each_token=True)
        return controller


class Seen:
    """What a steered run gave.

    Attributes:
        tokens: Real tokens of each row, those that it produced among them.
        prompts: Number of prompt tokens of each row.
        controls: By site, `[batch column ...]`; empty: they are not compared.
        starts: Column of each row's first real token.
        logits: `{(row, position): [vocab]}`.
        run: The run, for its record.
        beams: Of a beam search, the row that each token of each returned text came from, `[text step]`, or None.
    """

    beams: Any = None

    def __init__(self, run: Any, tokens: Any, prompts: Any, starts: Any, logits: Any, controls: Any = None):
        self.run, self.tokens, self.prompts, self.starts, self.logits = run, tokens, prompts, starts, logits
        self.controls = controls if controls is not None else controls_of(run)


def controls_of(run: Any) -> dict[Any, Tensor]:
    """What was added at each site, `[batch column ...]`, from the record."""
    names = {site: entry.total.get("u") or entry.own[0]["u"] for site, entry in run.signals.items()}
    return {site: run.record[name].clone() for site, name in names.items()}


def compare(
    seen: Seen,
    reference: Reference,
    *,
    produced: str = "greedy",
    forbidden: int | None = None,
    tolerance: float = 2e-4,
) -> None:
    """Every row of a run, against that row alone.

    Args:
        produced: `"greedy"`: each token after the prompt has the largest logit; `"sampled"`: it is not checked.
        forbidden: A token that could not be produced.
        tolerance: Of rounding, as a share of the largest number.
    """
    for row, (tokens, prompt) in enumerate(zip(seen.tokens, seen.prompts, strict=True)):
        logits, controls = reference.row(tokens, prompt, row)
        scale = max(1.0, float(logits.abs().max()))
        for (which, position), values in seen.logits.items():
            if which == row:
                error = float((values - logits[position]).abs().max())
                assert error < tolerance * scale, f"row {row}: logits at position {position} differ by {error:.2e}"
        if produced == "greedy":
            for position in range(prompt, len(tokens)):
                allowed = logits[position - 1].clone()
                if forbidden is not None:
                    allowed[forbidden] = -torch.inf
                short = float(allowed.max() - allowed[tokens[position]])
                assert short < tolerance * scale, f"row {row}: token {position} is {short:.2e} below the largest logit"
        through = len(tokens) - (prompt < len(tokens))  # the last token that is produced never enters the model
        start = seen.starts[row]
        for site, u in controls.items() if seen.controls else ():
            recorded = seen.controls[site][row]
            size = max(1.0, float(u.abs().max()))
            assert len(recorded) >= start + through, f"{site}: {len(recorded)} columns for {start} + {through} tokens"
            error = (recorded[start : start + through] - u[:through]).flatten(1).abs().amax(1)
            wrong = (error > tolerance * size).nonzero().flatten().tolist()
            assert not wrong, (
                f"row {row}, {site}: other controls at positions {wrong}, by up to {float(error.max()):.2e}"
            )
            pads = torch.cat([recorded[:start], recorded[start + through :]])
            assert not pads.any(), f"row {row}, {site}: a control at a pad or at a token that was dropped"


def batch_of(texts: list[list[int]], side: str) -> tuple[Tensor, Tensor, list[int]]:
    """Token ids and mask of some texts, padded on one side, and where each begins."""
    longest = max(map(len, texts))
    ids = torch.full((len(texts), longest), PAD)
    mask = torch.zeros_like(ids)
    starts = []
    for row, text in enumerate(texts):
        start = longest - len(text) if side == "left" else 0
        ids[row, start : start + len(text)] = torch.tensor(text)
        mask[row, start : start + len(text)] = 1
        starts.append(start)
    return ids, mask, starts


class Library:
    """One library's own API, on one tiny model.

    Args:
        name: `"bridge"` (its Hugging Face model is called), `"lens"` (the Bridge's own methods), `"hooked"`, or
            `"nnsight"`.
    """

    def __init__(self, name: str, family: str = "llama", *, dtype: torch.dtype = torch.float32):
        self.name, self.family = name, family
        self.model = tiny(family, host="bridge" if name == "lens" else name, dtype=dtype)
        if name in ("bridge", "lens"):
            self.inner = self.model.original_model
        elif name == "nnsight":
            self.inner = self.model._module
        self.plain = tiny(family, host="hf", dtype=dtype)[0]

    def reference(self, controller: Any = None) -> Reference:
        return Reference(self.plain, self.family, controller)

    def logits(self, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        """One forward pass, `[batch pos vocab]`."""
        with torch.no_grad():
            if self.name == "nnsight":
                call = {"input_ids": ids, **({} if mask is None else {"attention_mask": mask})}
                with self.model.trace(call, **options):
                    logits = self.model.output.logits.save()
                return logits  # noqa: RET504 (bound by the trace)
            if self.name == "bridge":
                if mask is not None and "past_key_values" not in options:  # GPT-2 takes no positions from the mask
                    options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
                return self.inner(input_ids=ids, attention_mask=mask, **options).logits
            return self.model(ids, **({} if mask is None else {"attention_mask": mask}), **options)

    def generate(self, ids: Tensor, mask: Tensor, count: int, **options: Any) -> Any:
        """`sequences` and, if the library gives them, `logits`, one `[batch vocab]` for each step."""
        if self.name in ("lens", "hooked"):
            fixed = {"do_sample": False, "stop_at_eos": False, "verbose": False, "padding_side": "left"}
            with torch.no_grad():
                tokens = self.model.generate(ids, max_new_tokens=count, **(fixed | options))
            return SimpleNamespace(sequences=tokens, logits=None)
        fixed = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": PAD}
        fixed |= {"output_logits": True, "return_dict_in_generate": True}
        if self.name == "bridge":
            return self.inner.generate(ids, attention_mask=mask, **(fixed | options))
        with self.model.generate({"input_ids": ids, "attention_mask": mask}, **(fixed | options)) as tracer:
            out = tracer.result.save()
        return out  # noqa: RET504 (bound by the trace)

    @property
    def forbidden(self) -> int | None:
        """The token that a generation of fixed length cannot produce."""
        return EOS if self.name in ("bridge", "nnsight") else None


def forward(library: Library, texts: list[list[int]], side: str, controller: Any, mask: bool = True) -> Seen:
    """Texts in one padded batch, through one forward pass."""
    ids, real, starts = batch_of(texts, side)
    with padding(library.model, side), sl.steer(library.model, controller, record="all") as run:
        logits = library.logits(ids, real if mask else None)
        seen = controls_of(run)
    found = {(row, t): logits[row, starts[row] + t] for row, text in enumerate(texts) for t in range(len(text))}
    return Seen(run, texts, [len(text) for text in texts], starts, found, seen)


def generation(library: Library, texts: list[list[int]], count: int, controller: Any, **options: Any) -> Seen:
    """Texts in one batch, padded on the left, continued."""
    ids, mask, starts = batch_of(texts, "left")
    with padding(library.model, "left"), sl.steer(library.model, controller, record="all") as run:
        out = library.generate(ids, mask, count, **options)
        seen = controls_of(run)
    each = len(out.sequences) // len(texts)
    tokens, prompts, begins, logits = [], [], [], {}
    for row, sequence in enumerate(out.sequences.tolist()):
        start = starts[row // each]
        tokens.append(sequence[start:])
        prompts.append(len(texts[row // each]))
        begins.append(start)
        # a beam's logits are those of the step's own order of rows
        if out.logits is not None and options.get("num_beams", 1) == 1 and len(out.logits) == count:
            logits |= {(row, prompts[-1] - 1 + step): values[row] for step, values in enumerate(out.logits)}
    found = Seen(run, tokens, prompts, begins, logits, seen)
    found.beams = getattr(out, "beam_indices", None)
    return found


def moved(beams: Tensor) -> bool:
    """Whether a row went on from another one, after a pass in which they differed; of a search's `beam_indices`."""
    return bool((beams[:, 2:] != beams[:, 1:-1]).any())


def loops(where: Any = "last", *, size: float = 3.0) -> sl.Controller:
    """A feedback loop and a constant push, on two layers."""
    draw = Draw(11)
    pull = sl.Loop(Pull(draw.unit(32), 0.8, 2.0), sl.Site(1), where=where)
    return sl.Controller([pull, sl.Loop(Push(size * draw.unit(32)), sl.Site(2, "resid_pre"), where=where)])


def gated(controller: sl.Controller, *, threshold: float = 0.0, layer: int = 2) -> sl.Controller:
    """The same, decided on the prompt's mean state behind the first control."""
    summary = sl.Summary(sl.Site(layer), "mean", "prompt")
    return sl.when(controller, Gate(Above(Draw(12).unit(32), threshold), [summary]))
