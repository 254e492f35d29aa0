"""Laws that remember the tokens of a sequence: which tokens they see, and what they know once some are taken back."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import steerlens as sl
from steerlens.core import Law
from steerlens.models import tiny
from steerlens.testing import Case, discover_hosts
from tests.reference import Pull, Running
from tests.sequence_cases import Draw, Library, compare, generation
from tests.test_sequence_turns import by_hand
from tests.test_sequences import REPEATING, TEXT, new_cache

HOSTS = discover_hosts()
HUGGING = [name for name in ("bridge", "nnsight") if name in HOSTS]
MASK = torch.tensor([True, False, True, True, False, True, False, False, True, True, False, True])


class Whole(Law):
    """As `Running`, but every token's sum is kept."""

    __init__, error, act = Running.__init__, Pull.error, Running.act

    def control(self, x, layers, sequence):
        before = sequence.get(self.name)
        total = self.error(x).cumsum(1)
        total = total if before is None else total + before[:, -1:]
        sequence[self.name] = total
        return self.gain * torch.tanh(total) * self.v


@cache
def library(name):
    return Library(name)


def remembering(law=Running, where="all", gain=2.0):
    draw = Draw(3)
    loops = [sl.Loop(law(draw.unit(32), gain, 1.0, f"sum{layer}"), sl.Site(layer), where=where) for layer in (1, 2)]
    return sl.Controller(loops)


@pytest.mark.parametrize("where", [MASK, lambda positions: positions % 3 > 0, "last", slice(2, None)], ids=str)
@pytest.mark.parametrize("name", HOSTS)
def test_a_law_remembers_the_selected_tokens_of_each_row_and_no_pad(name, where):
    lib, texts = library(name), [TEXT[:3], TEXT[:7], [5, 9]]
    for law in (Running, Whole):
        controller = remembering(law, where)
        seen = generation(lib, texts, 4, controller)
        compare(seen, lib.reference(controller), forbidden=lib.forbidden)
        side = "left" if name == "hooked" else "right"
        seen = by_hand(lib, texts, side, controller, 3)
        for row, (tokens, prompt) in enumerate(zip(seen.tokens, seen.prompts, strict=True)):
            wanted, _ = lib.reference(controller).row(tokens, prompt, row)
            for (which, position), logits in seen.logits.items():
                if which == row:
                    torch.testing.assert_close(logits, wanted[position], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", HUGGING)
@pytest.mark.parametrize("where", ["all", MASK, lambda positions: positions > 1], ids=str)
def test_memory_follows_beams_of_unequal_prompts(name, where):
    lib, controller = library(name), remembering(where=where)
    seen = generation(lib, [TEXT[:3], TEXT[:6]], 5, controller, num_beams=3, num_return_sequences=2)
    compare(seen, lib.reference(controller), produced="beams")


@pytest.mark.parametrize("kind", ["lookup", "assistant"])
@pytest.mark.parametrize("where", ["all", "generated", lambda positions: positions % 3 > 0], ids=str)
@pytest.mark.parametrize("name", HUGGING)
def test_rejected_drafts_are_forgotten_or_refused(name, where, kind):
    """A law with a value for every token goes back to the accepted ones; one that keeps the last cannot."""
    lib = library(name)
    assistant = tiny("llama", host="hf", seed=0)[0] if kind == "assistant" else None
    options = {"prompt_lookup_num_tokens": 3} if kind == "lookup" else {"assistant_model": assistant}
    for law in (Whole, Running):
        controller, refused = remembering(law, where, gain=1.0), False
        try:
            seen = generation(lib, [REPEATING], 8, controller, **options)
        except RuntimeError as error:
            refused = "remembers the tokens of its sequence by the last one only" in str(error)
            if not refused:
                raise
        assert not (refused and law is Whole)
        # a mask may have left out all tokens of a draft that was rejected
        assert refused or law is Whole or callable(where)
        if not refused:
            seen.logits = {}
            seen.controls = {site: u[:, : len(seen.tokens[0]) - 1] for site, u in seen.controls.items()}
            compare(seen, lib.reference(controller), forbidden=lib.forbidden)


@pytest.mark.parametrize("name", HUGGING)
def test_an_error_carried_over_tokens_is_refused_with_drafts(name):
    case = Case("pid", name, model=library(name).model)
    controller = case.fit(kp=0.4, kd=0.6, carry=True, paper=True)
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny("llama", host="hf", seed=0)[0]}):
        with pytest.raises(RuntimeError, match="generated tokens must come one at a time"):
            generation(library(name), [REPEATING], 8, controller, **options)
    assert len(generation(library(name), [REPEATING], 4, controller).tokens[0]) == len(REPEATING) + 4


@pytest.mark.parametrize("name", HUGGING)
@pytest.mark.parametrize("law", [Running, Whole])
def test_a_cache_cut_in_a_prompt_is_continued_as_if_it_had_ended_there_or_refused(name, law):
    """Where the law has seen none, all, or some of the tokens of that pass."""
    lib = library(name)
    for where, cut in (("all", 6), (slice(2, 4), 6), (slice(5, None), 4), ("all", 4), (MASK, 4), ("all", 0)):
        controller = remembering(law, where)
        with torch.no_grad(), sl.steer(lib.model, controller):
            kept = new_cache(lib)
            lib.logits(torch.tensor([TEXT[:6]]), **kept)
            cache = kept["past_key_values"]
            if cut < 6:
                cache.crop(cut - 6)
            text = [*TEXT[:cut], 60, 61, 62]
            if law is Running and cut == 4 and not isinstance(where, slice):
                with pytest.raises(RuntimeError, match="by the last one only"):
                    lib.logits(torch.tensor([text[cut:]]), **kept)
                continue
            logits = lib.logits(torch.tensor([text[cut:]]), **kept)
        wanted, _ = lib.reference(controller).row(text, len(text))
        torch.testing.assert_close(logits[0], wanted[cut:], rtol=1e-3, atol=1e-3)
