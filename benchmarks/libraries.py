"""The same vector, fitted and added by another library: the numbers agree, and what differs is at the edges.

python benchmarks/libraries.py            prints the table of docs/libraries.md

`pip install --no-deps steering-vectors repeng pyvene`, and matplotlib for pyvene, first; a library that is missing is
left out. SmolLM2, float32. Each library gets the same texts, the same prompt and, if its own fit is not the mean
difference, the same vector; it is that after block 15, at strength 1.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import time
from collections.abc import Callable, Iterator

import common  # noqa: F401 (sets the threads before torch is loaded)
import numpy
import torch
from torch import Tensor

import steerlens as sl
from steerlens.models import smollm2

LAYER, PROMPT, LONGER = (
    15,
    "The committee has decided that",
    "When the door opened and she looked outside, the first thing",
)
TOKENS, ROUNDS = 24, 5
GENERATION = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 2}


class Library:
    """One library at work on a model of its own."""

    def __init__(self, name: str, logits: Callable, generate: Callable, tokenizer: object):
        self.name, self.logits, self.generate, self.tokenizer = name, logits, generate, tokenizer
        # None: it fits none
        self.vector: Tensor | None = None
        self.steer: Callable[[], contextlib.AbstractContextManager]

    def encode(self, texts: list[str], side: str) -> tuple[Tensor, Tensor]:
        self.tokenizer.padding_side = side
        found = self.tokenizer(texts, return_tensors="pt", padding=True)
        return found["input_ids"], found["attention_mask"]


def steerlens(pairs: sl.Pairs) -> Library:
    model = smollm2()
    own = Library(
        f"steerlens {sl.__version__}",
        lambda ids, mask: model(ids, attention_mask=mask),
        lambda ids: model.generate(ids, max_new_tokens=TOKENS, do_sample=False, stop_at_eos=False, verbose=False),
        model.tokenizer,
    )
    controller = sl.caa(model, pairs, layers=LAYER)
    own.vector = controller.loops[0].law.vector
    own.steer = lambda: sl.steer(model, controller.at(slice(0, None)), record=None)
    return own


def of_transformers(name: str) -> tuple[Library, object, object]:
    model, tokenizer = smollm2(host="hf")
    own = Library(
        f"{name} {importlib.metadata.version(name)}",
        lambda ids, mask: model(input_ids=ids, attention_mask=mask).logits,
        lambda ids: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GENERATION),
        tokenizer,
    )
    return own, model, tokenizer


def steering_vectors(pairs: sl.Pairs) -> Library:
    from steering_vectors import train_steering_vector

    own, model, tokenizer = of_transformers("steering-vectors")
    texts = list(zip(pairs.positive, pairs.negative, strict=True))
    trained = train_steering_vector(model, tokenizer, texts, layers=[LAYER], show_progress=False)
    own.vector = trained.layer_activations[LAYER]
    own.steer = lambda: trained.apply(model)
    return own


def repeng(pairs: sl.Pairs, vector: Tensor) -> Library:
    # repeng 0.4 uses a name in annotations that numpy 2 has removed
    if not hasattr(numpy, "float_"):
        numpy.float_ = numpy.float64
    from repeng import ControlModel, ControlVector, DatasetEntry

    own, model, tokenizer = of_transformers("repeng")
    wrapped = ControlModel(model, [LAYER])
    texts = [DatasetEntry(*both) for both in zip(pairs.positive, pairs.negative, strict=True)]
    own.vector = torch.from_numpy(
        ControlVector.train(wrapped, tokenizer, texts, hidden_layers=[LAYER]).directions[LAYER]
    )

    @contextlib.contextmanager
    def steer() -> Iterator[None]:
        wrapped.set_raw_control({LAYER: vector})
        yield
        wrapped.reset()

    own.steer = steer
    return own


def pyvene(pairs: sl.Pairs, vector: Tensor) -> Library:
    from pyvene import IntervenableModel

    own, model, _ = of_transformers("pyvene")
    site = {"layer": LAYER, "component": "block_output", "intervention": lambda base, source: base + vector}
    changed = IntervenableModel(site, model)
    logits, generate, steered = own.logits, own.generate, False
    everywhere = {"unit_locations": None}

    def steered_logits(ids: Tensor, mask: Tensor) -> Tensor:
        return (
            changed({"input_ids": ids, "attention_mask": mask}, **everywhere)[1].logits
            if steered
            else logits(ids, mask)
        )

    def steered_generate(ids: Tensor) -> None:
        if not steered:
            generate(ids)
            return
        both = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        changed.generate(both, **everywhere, intervene_on_prompt=True, **GENERATION)

    @contextlib.contextmanager
    def steer() -> Iterator[None]:
        nonlocal steered
        steered = True
        yield
        steered = False

    own.logits, own.generate, own.steer = steered_logits, steered_generate, steer
    return own


def rows(own: Library, reference: Library) -> dict[str, str]:
    with torch.no_grad():
        ids, mask = own.encode([PROMPT], "left")
        with reference.steer():
            expected = reference.logits(ids, mask)[0]
        with own.steer():
            alone = own.logits(ids, mask)[0]
            apart = {}
            for side in ("left", "right"):
                both, pads = own.encode([PROMPT, LONGER], side)
                chosen = slice(-len(alone), None) if side == "left" else slice(0, len(alone))
                try:
                    apart[side] = f"{float((own.logits(both, pads)[0, chosen] - alone).abs().max()):.0e}"
                except RuntimeError as error:
                    print(f"{own.name}, padded on the {side}: {error}")
                    apart[side] = "raises"
        plain, steered = timed(own, ids)
    alike = None if own.vector is None else torch.cosine_similarity(own.vector, reference.vector, dim=0)
    return {
        "cosine of its fitted vector": "-" if alike is None else f"{float(alike):.6f}",
        "logits with the same vector": f"{float((alone - expected).abs().max()):.0e}",
        "a row padded on the left": apart["left"],
        "a row padded on the right": apart["right"],
        "cost of decoding": f"{steered / plain - 1:+.1%}",
    }


def timed(own: Library, ids: Tensor) -> tuple[float, float]:
    """CPU seconds of a generation, unsteered and steered, the least of some rounds."""
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for kept, context in zip(found, (contextlib.nullcontext, own.steer), strict=True):
            with context():
                start = time.process_time()
                own.generate(ids)
                kept.append(time.process_time() - start)
    return min(found[0]), min(found[1])


def main() -> None:
    pairs = sl.shipped("sentiment", split="dev")
    pairs = sl.Pairs([a + b for a, b in pairs.positive], [a + b for a, b in pairs.negative])
    reference = steerlens(pairs)
    table = {reference.name: rows(reference, reference)}
    for other in (
        steering_vectors,
        lambda texts: repeng(texts, reference.vector),
        lambda texts: pyvene(texts, reference.vector),
    ):
        try:
            library = other(pairs)
        except ImportError as error:
            print(f"left out: {error}")
        else:
            table[library.name] = rows(library, reference)
    names = list(next(iter(table.values())))
    print(f"| | {' | '.join(table)} |\n| --- |{' --- |' * len(table)}")
    for name in names:
        print(f"| {name} | {' | '.join(row[name] for row in table.values())} |")


if __name__ == "__main__":
    main()
