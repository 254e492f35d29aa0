"""Random controllers under every way to read and to generate that the other random cases do not draw."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import steerlens as sl
from steerlens.testing import discover_hosts, padding
from tests.reference import Running
from tests.sequence_cases import Library, batch_of, compare, controls_of, generation
from tests.test_random_sequences import each
from tests.test_sequence_turns import by_hand

HOSTS = discover_hosts()
HUGGING = [name for name in HOSTS if name in ("bridge", "nnsight")]


@cache
def wide(name, family):
    return Library(name, family, dtype=torch.float64)


def of_length(draw, length):
    return draw.text(length, length)


@pytest.mark.parametrize("name", HUGGING)
def test_static_caches(name):
    """Of unequal prompts: TransformerLens 3.9's Bridge is wrong, steered or not, if no row has a pad."""

    def case(lib, draw):
        length = draw.randint(2, 7)
        texts = [of_length(draw, length), of_length(draw, length + draw.randint(1, 3))]
        controller = draw.controller(lib.family, batch=draw.choice([None, 2]))
        seen = generation(lib, texts, draw.randint(2, 5), controller, cache_implementation="static")
        compare(seen, lib.reference(controller), forbidden=lib.forbidden)

    each(name, 18, case, offset=4000)


@pytest.mark.parametrize("name", HUGGING)
def test_prompts_in_chunks(name):
    """Or one error: a gate cannot be asked for before the last chunk."""

    def case(lib, draw):
        texts = [of_length(draw, draw.randint(5, 10))]
        controller = draw.controller(lib.family, memory=draw.random() < 0.5)
        try:
            seen = generation(lib, texts, draw.randint(2, 4), controller, prefill_chunk_size=draw.randint(2, 4))
        except RuntimeError as error:
            if "still to come" not in str(error):
                raise
            return
        compare(seen, lib.reference(controller), forbidden=lib.forbidden)

    each(name, 18, case, offset=5000)


@pytest.mark.parametrize("name", HUGGING)
def test_beams(name):
    def case(lib, draw):
        length, beams = draw.randint(2, 7), draw.randint(2, 4)
        texts = [of_length(draw, length) for _ in range(draw.randint(1, 2))]
        controller = draw.controller(lib.family, memory=True)
        options = {"num_beams": beams, "num_return_sequences": draw.randint(1, beams)}
        seen = generation(lib, texts, draw.randint(2, 4), controller, **options)
        compare(seen, lib.reference(controller), produced="beams")

    each(name, 15, case, offset=6000)


@pytest.mark.parametrize("name", HUGGING)
def test_prompt_lookup(name):
    def case(lib, draw):
        piece = draw.text(2, 4)
        text = [*piece, *draw.text(1, 3), *piece]
        controller = draw.controller(lib.family, memory=draw.random() < 0.5)
        remembers = any(isinstance(loop.law, Running) for loop in controller.loops)
        try:
            seen = generation(lib, [text], draw.randint(3, 6), controller, prompt_lookup_num_tokens=draw.randint(1, 3))
        except RuntimeError as error:  # a law that keeps its last token only, if a draft was rejected
            if not remembers or "by the last one only" not in str(error):
                raise
            return
        seen.logits = {}
        seen.controls = {site: u[:, : len(seen.tokens[0]) - 1] for site, u in seen.controls.items()}
        compare(seen, lib.reference(controller), forbidden=lib.forbidden)

    each(name, 18, case, offset=7000)


@pytest.mark.parametrize("name", HOSTS)
def test_loops_by_hand(name):
    def case(lib, draw):
        texts = [draw.text() for _ in range(draw.randint(1, 3))]
        controller = draw.controller(lib.family, batch=draw.choice([None, len(texts)]))
        side = "left" if name == "hooked" else draw.choice(["left", "right"])
        if lib.family == "gemma":  # its sliding window counts the pads behind a short prompt, steered or not
            side = "left"
        seen = by_hand(lib, texts, side, controller, draw.randint(1, 4))
        reference = lib.reference(controller)
        for row, (tokens, prompt) in enumerate(zip(seen.tokens, seen.prompts, strict=True)):
            wanted, u = reference.row(tokens, prompt, row)
            scale = max(1.0, float(wanted.abs().max()))
            for (which, position), logits in seen.logits.items():
                if which == row:
                    torch.testing.assert_close(logits, wanted[position], rtol=0, atol=3e-4 * scale)
            for site, values in u.items():
                size = max(1.0, float(values.abs().max()))
                torch.testing.assert_close(seen.controls[site][row], values, rtol=0, atol=3e-4 * size)

    each(name, 18, case, offset=8000)


def scored(lib, draw, tolerance):
    texts = [draw.text(3, 9) for _ in range(draw.randint(1, 3))]
    prompts = [draw.randint(1, len(text)) for text in texts]
    controller = draw.controller(lib.family, batch=draw.choice([None, len(texts)])).to(
        dtype=next(lib.plain.parameters()).dtype
    )
    side = draw.choice(["left", "right"])
    ids, mask, starts = batch_of(texts, side)
    with padding(lib.model, side), sl.steer(lib.model, controller, record="all") as run, run.scoring(prompts):
        logits = lib.logits(ids, mask)
        controls = controls_of(run)
    found = {(row, t): logits[row, starts[row] + t] for row, text in enumerate(texts) for t in range(len(text))}
    for site, u in controls.items():
        for row, text in enumerate(texts):
            assert not torch.cat([u[row, : starts[row]], u[row, starts[row] + len(text) :]]).any(), f"{site}: a pad"
    # what is produced is not compared, and every token of a text went through the model
    reference = lib.reference(controller)
    for row, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        wanted, expected = reference.row(text, prompt, row)
        scale = max(1.0, float(wanted.abs().max()))
        for t in range(len(text)):
            assert (found[row, t] - wanted[t]).abs().max() < tolerance * scale, f"row {row}, token {t}, {side}"
        for site, u in expected.items():
            mine = controls[site][row, starts[row] : starts[row] + len(text)]
            assert (mine - u).abs().max() < tolerance * max(1.0, float(u.abs().max())), f"{site}, row {row}, {side}"


@pytest.mark.parametrize("name", HOSTS)
def test_scoring(name):
    each(name, 30, lambda lib, draw: scored(lib, draw, 2e-4), offset=9000)


@pytest.mark.parametrize("name", HOSTS)
def test_scoring_in_float64(name):
    """Rounding falls by six orders of magnitude, so what is left is no difference of another kind.

    Of GPT-2: RMS norms compute in float32, whatever the model's dtype.
    """

    def case(lib, draw):
        if lib.family == "gpt2":
            scored(wide(lib.name, lib.family), draw, 1e-10)

    each(name, 18, case, offset=9500)
