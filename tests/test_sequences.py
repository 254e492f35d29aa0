"""Every way to feed tokens that once put the control at the wrong ones, with each library's own calls."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch

import steerlens as sl
from steerlens.models import tiny
from steerlens.testing import discover_hosts, padding
from tests.reference import Running
from tests.sequence_cases import (
    Draw,
    Library,
    Seen,
    compare,
    controls_of,
    gated,
    generation,
    loops,
    moved,
)

HOSTS = discover_hosts()
LENS = [name for name in ("lens", "hooked") if {"lens": "bridge"}.get(name, name) in HOSTS]
HUGGING = [name for name in ("bridge", "nnsight") if name in HOSTS]
HOOKED = ["hooked"] if "hooked" in HOSTS else []
TEXT = [3, 17, 25, 29, 41, 22, 46, 50, 51, 52]
REPEATING = [3, 17, 25, 29, 41, 22, 3, 17, 25]
WHERES = ["last", "prompt", "last_prompt", "generated", "all", slice(-3, None), slice(2, 7)]


@cache
def library(name, family="llama"):
    return Library(name, family)


def words(text):
    return " ".join(f"w{token}" for token in text)


# -- 1. prompts of unequal length without a mask ---------------------------------------------------------------------


@pytest.mark.parametrize("way", ["call", "cache", "tokens", "loss"])
@pytest.mark.parametrize("name", LENS)
def test_a_list_of_prompts_is_steered_as_each_alone(name, way):
    """`tokens`: what `to_tokens` makes of the list; `cache`: run_with_cache."""
    lib, texts = library(name), [[7, 30, 31], [3, 17, 25, 29, 41, 22], [9, 12]]
    for where in ("last", "all", slice(-2, None)):
        controller = loops(where)
        prompts = [words(text) for text in texts]
        with torch.no_grad(), padding(lib.model, "right"), sl.steer(lib.model, controller, record="all") as run:
            given = lib.model.to_tokens(prompts) if way == "tokens" else prompts
            if way == "cache":
                logits, _ = lib.model.run_with_cache(given)
            elif way == "loss":
                lib.model(given, return_type="loss")
            else:
                logits = lib.model(given)
            controls = controls_of(run)
        places = [(row, t) for row, text in enumerate(texts) for t in range(len(text))]
        found = {} if way == "loss" else {place: logits[place] for place in places}
        compare(Seen(run, texts, [3, 6, 2], [0, 0, 0], found, controls), lib.reference(controller))


@pytest.mark.parametrize("name", LENS)
def test_a_gate_reads_no_pad_of_a_list_of_prompts(name):
    lib = library(name)
    texts = [[draw % 97, 17, draw * 7 % 97, 3][: 2 + draw % 3] for draw in range(12)] + [[5, 6, 7, 8, 9, 10, 11, 12]]
    controller = gated(loops("all"))
    with torch.no_grad(), padding(lib.model, "right"), sl.steer(lib.model, controller, record="all") as run:
        lib.model([words(text) for text in texts])
        controls = controls_of(run)
    opened = [bool(u.any()) for u in controls[sl.Site(1)]]
    assert True in opened
    assert False in opened
    compare(Seen(run, texts, list(map(len, texts)), [0] * len(texts), {}, controls), lib.reference(controller))


@pytest.mark.skipif("nnsight" not in HOSTS, reason="nnsight is not installed")
def test_a_list_of_prompts_in_a_trace_of_nnsight_is_steered_as_each_alone():
    lib, texts = library("nnsight"), [[7, 30, 31], [3, 17, 25, 29, 41, 22]]
    controller = loops("last")
    with torch.no_grad(), sl.steer(lib.model, controller, record="all") as run:
        with lib.model.trace([words(text) for text in texts]):
            logits = lib.model.output.logits.save()
        controls = controls_of(run)
    found = {(0, t): logits[0, 3 + t] for t in range(3)} | {(1, t): logits[1, t] for t in range(6)}
    compare(Seen(run, texts, [3, 6], [3, 0], found, controls), lib.reference(controller))


# -- 2. a cache kept over turns --------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["last", "prompt", "generated", "all", "last_prompt"])
@pytest.mark.parametrize("turns", [2, 3])
@pytest.mark.parametrize("name", HUGGING)
def test_a_kept_cache_does_not_make_the_next_message_a_generated_one(name, turns, where):
    """Tokens in the cache stay as they were computed; what is new in a call is a prompt, and then generated."""
    from transformers import DynamicCache

    lib, controller, count = library(name), loops(where), 3
    kept = DynamicCache(config=lib.inner.config)
    text, ends = TEXT[:4], []
    with sl.steer(lib.model, controller, record="all"):
        for turn in range(turns):
            prompt = len(text)
            ids = torch.tensor([text])
            out = lib.generate(ids, torch.ones_like(ids), count, past_key_values=kept)
            ends += [prompt] * (prompt + count - 1 - len(ends))
            whole = out.sequences[0].tolist()
            logits, _ = lib.reference(controller).row(whole[:-1], ends)
            for step, values in enumerate(out.logits):
                torch.testing.assert_close(values[0], logits[prompt - 1 + step], rtol=1e-3, atol=1e-3)
            text = [*whole, 50 + turn, 60, 70]


@pytest.mark.parametrize("where", ["last", "prompt", "all"])
@pytest.mark.parametrize("name", HUGGING)
def test_a_message_given_by_itself_to_a_kept_cache_is_a_prompt(name, where):
    """`generate` gets the new tokens only, with a mask of the whole text."""
    lib, controller = library(name), loops(where)
    kept, text, ends = new_cache(lib)["past_key_values"], [], []
    with sl.steer(lib.model, controller, record="all") as run:
        for message in (TEXT[:4], [50, 60, 70], [51]):
            past = len(text)
            mask = torch.ones(1, past + len(message), dtype=torch.long)
            out = lib.generate(torch.tensor([message]), mask, 3, past_key_values=kept)
            tokens = out.sequences[0].tolist()
            assert tokens[: len(message)] == message
            text += tokens
            prompt = past + len(message)
            ends += [prompt] * (len(text) - 1 - len(ends))
            logits, u = lib.reference(controller).row(text[:-1], ends)
            torch.testing.assert_close(torch.cat(out.logits), logits[prompt - 1 :], rtol=1e-3, atol=1e-3)
            for site, values in controls_of(run).items():
                torch.testing.assert_close(values[0], u[site], rtol=1e-3, atol=1e-3)
            # the last token that was written has not been read
            text.pop()


@pytest.mark.parametrize("name", HUGGING)
def test_a_cache_kept_and_cropped_goes_on_from_where_it_was_cut(name):
    from transformers import DynamicCache

    lib, controller = library(name), loops("all")
    kept = DynamicCache(config=lib.inner.config)
    with sl.steer(lib.model, controller, record="all") as run:
        ids = torch.tensor([TEXT[:8]])
        lib.generate(ids, torch.ones_like(ids), 3, past_key_values=kept)
        kept.crop(5 - kept.get_seq_length())
        ids = torch.tensor([[*TEXT[:5], 60, 61]])
        out = lib.generate(ids, torch.ones_like(ids), 3, past_key_values=kept)
        controls = controls_of(run)
    tokens = out.sequences.tolist()
    found = {(0, 6 + step): values[0] for step, values in enumerate(out.logits)}
    compare(Seen(run, tokens, [7], [0], found, controls), lib.reference(controller), forbidden=lib.forbidden)


# -- 3. a prompt in pieces -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", WHERES, ids=str)
@pytest.mark.parametrize("name", HUGGING)
def test_a_prompt_in_chunks_ends_where_generation_begins(name, where):
    lib = library(name)
    for controller in (loops(where), sl.schedule(loops(where), [0.5])):
        for size in (3, 4, 9):
            seen = generation(lib, [TEXT], 4, controller, prefill_chunk_size=size)
            compare(seen, lib.reference(controller), forbidden=lib.forbidden)


@pytest.mark.parametrize("name", HUGGING)
def test_a_gate_under_chunks_decides_on_the_whole_prompt(name):
    lib, controller = library(name), gated(loops("last"))
    decided = set()
    for first in range(0, 90, 6):
        seen = generation(
            lib, [[first, 17, 2 * first % 97, 29, 7 * first % 90, 5, 6]], 2, controller, prefill_chunk_size=3
        )
        compare(seen, lib.reference(controller), forbidden=lib.forbidden)
        decided.add(bool(seen.controls[sl.Site(1)].any()))
    assert decided == {True, False}


def pieces(lib, parts, run):
    """Parts of one row, fed by hand with one cache."""
    if lib.name == "hooked":
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        kept = TransformerLensKeyValueCache.init_cache(lib.model.cfg, lib.model.cfg.device, 1)
        options = {"past_kv_cache": kept}
    else:
        from transformers import DynamicCache

        options = {"past_key_values": DynamicCache(config=lib.inner.config)}
        options |= {"use_cache": True}
    return torch.cat([lib.logits(torch.tensor([part]), **options) for part in parts], 1)


@pytest.mark.parametrize("where", ["last", "prompt", "generated", "all", slice(2, 7)], ids=str)
@pytest.mark.parametrize("name", [*HUGGING, *HOOKED])
def test_pieces_fed_by_hand_continue_the_prompt_and_single_tokens_are_generated(name, where):
    lib, controller = library(name), loops(where)
    with sl.steer(lib.model, controller, record="all") as run:
        logits = pieces(lib, [TEXT[:4], TEXT[4:8], TEXT[8:9], TEXT[9:]], run)
        controls = controls_of(run)
    ends = [4] * 4 + [8] * 6
    wanted, u = lib.reference(controller).row(TEXT, ends)
    torch.testing.assert_close(logits[0], wanted, rtol=1e-3, atol=1e-3)
    for site, values in u.items():
        torch.testing.assert_close(controls[site][0], values, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("where", WHERES, ids=str)
@pytest.mark.parametrize("name", [*HUGGING, *HOOKED])
def test_scoring_says_where_a_prompt_in_pieces_ends(name, where):
    lib, controller = library(name), loops(where)
    with sl.steer(lib.model, controller, record="all") as run, run.scoring(6):
        logits = pieces(lib, [TEXT[:4], TEXT[4:8], TEXT[8:]], run)
        controls = controls_of(run)
    found = {(0, t): logits[0, t] for t in range(len(TEXT))}
    seen = Seen(run, [TEXT], [6], [0], found, controls)
    wanted, u = lib.reference(controller).row(TEXT, 6)
    torch.testing.assert_close(logits[0], wanted, rtol=1e-3, atol=1e-3)
    for site, values in u.items():
        torch.testing.assert_close(seen.controls[site][0], values, rtol=1e-3, atol=1e-3)


# -- 4. speculative decoding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["last", "all", "generated", slice(2, None)], ids=str)
@pytest.mark.parametrize("kind", ["lookup", "assistant"])
@pytest.mark.parametrize("name", HUGGING)
def test_speculative_decoding_is_greedy_decoding(name, kind, where):
    """The record holds accepted tokens only."""
    lib = library(name)
    assistant = tiny("llama", host="hf", seed=0)[0] if kind == "assistant" else None
    options = {"prompt_lookup_num_tokens": 3} if kind == "lookup" else {"assistant_model": assistant}
    for controller in (loops(where, size=1.0), sl.schedule(loops(where), [1.0, 0.2, 0.7])):
        seen = generation(lib, [REPEATING], 8, controller, **options)
        assert all(u.shape[1] <= len(seen.tokens[0]) for u in seen.controls.values())
        seen.logits = {}
        trimmed = {site: u[:, : len(seen.tokens[0]) - 1] for site, u in seen.controls.items()}
        seen.controls = trimmed
        compare(seen, lib.reference(controller), forbidden=lib.forbidden)


# -- 6. copies of a cache, sequences in turn -------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["last", "all", "generated"])
@pytest.mark.parametrize("name", [*HUGGING, *HOOKED])
def test_copies_of_a_prefix_cache_are_continued_alike(name, where):
    lib, controller = library(name), loops(where)
    with sl.steer(lib.model, controller, record="all") as run, torch.no_grad():
        if name == "hooked":
            from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

            kept = TransformerLensKeyValueCache.init_cache(lib.model.cfg, lib.model.cfg.device, 1)
            lib.logits(torch.tensor([TEXT[:6]]), past_kv_cache=kept)
            kept.freeze()
            calls = [{"past_kv_cache": kept}] * 2
        else:
            from transformers import DynamicCache

            kept = DynamicCache(config=lib.inner.config)
            lib.logits(torch.tensor([TEXT[:6]]), past_key_values=kept, use_cache=True)
            calls = [{"past_key_values": copy.deepcopy(kept)} for _ in range(2)]
        results = [(lib.logits(torch.tensor([TEXT[6:]]), **call), controls_of(run)) for call in calls]
    wanted, u = lib.reference(controller).row(TEXT, [6] * 6 + [10] * 4)
    for logits, controls in results:
        torch.testing.assert_close(logits[0], wanted[6:], rtol=1e-3, atol=1e-3)
        for site, values in u.items():
            torch.testing.assert_close(controls[site][0, -4:], values[6:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["gate", "memory"])
@pytest.mark.parametrize("name", [*HUGGING, *HOOKED])
def test_what_is_known_of_a_prefix_goes_with_each_copy_of_its_cache(name, kind):
    """The decision of a gate, or what a law remembers; the copies and the first one go on in turn, each by itself."""
    lib = library(name)
    controller = remembering() if kind == "memory" else gated(loops("all"), threshold=-9.0)
    texts = [[*TEXT[:6], 11, 12, 13], [*TEXT[:6], 70, 71, 72], [*TEXT[:6], 5, 88, 9]]
    with sl.steer(lib.model, controller, record="all"), torch.no_grad():
        first = new_cache(lib)
        lib.logits(torch.tensor([TEXT[:6]]), **first)
        kept = [copy.deepcopy(first), first, copy.deepcopy(first)]
        found = [
            [lib.logits(torch.tensor([[text[t]]]), **each)[0] for text, each in zip(texts, kept, strict=True)]
            for t in (6, 7, 8)
        ]
    for text, logits in zip(texts, zip(*found, strict=True), strict=True):
        wanted, u = lib.reference(controller).row(text, 6)
        assert u[sl.Site(1)][6:].any(1).all()
        torch.testing.assert_close(torch.cat(logits), wanted[6:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [*HUGGING, *HOOKED])
def test_two_sequences_decoded_in_turn_keep_a_gate_each(name):
    """Prompts of one length: nothing but their caches tells them apart."""
    lib, controller = library(name), gated(loops("all"))
    texts = {}
    for first in range(90):
        text = [3, 17, first, 29, first]
        texts.setdefault(bool(lib.reference(controller).row(text, 5)[1][sl.Site(1)].any()), text)
    assert len(texts) == 2
    steps = [[11], [12]]
    with sl.steer(lib.model, controller, record="all"), torch.no_grad():
        kept = {opened: new_cache(lib) for opened in texts}
        parts = {opened: [lib.logits(torch.tensor([text]), **kept[opened])] for opened, text in texts.items()}
        for step in steps:
            for opened in texts:
                parts[opened].append(lib.logits(torch.tensor([step]), **kept[opened]))
    for opened, text in texts.items():
        wanted, _ = lib.reference(controller).row([*text, 11, 12], 5)
        torch.testing.assert_close(torch.cat(parts[opened], 1)[0], wanted, rtol=1e-3, atol=1e-3)


def new_cache(lib, batch=1):
    """Arguments of a call that begins a sequence with a cache."""
    if lib.name == "hooked":
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        cache = TransformerLensKeyValueCache.init_cache(lib.model.cfg, lib.model.cfg.device, batch)
        return {"past_kv_cache": cache}
    from transformers import DynamicCache

    return {"past_key_values": DynamicCache(config=lib.inner.config), "use_cache": True}


# -- 7. caches of a fixed size ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["static", "padded", "sliding"])
@pytest.mark.parametrize("name", HUGGING)
def test_a_cache_of_fixed_size_changes_nothing(name, kind):
    lib = library(name, "gemma" if kind == "sliding" else "llama")
    texts = [TEXT[:5], TEXT] if kind == "padded" else [TEXT]
    if (name, kind) == ("bridge", "static") and HOOKED:  # TransformerLens 3
        with pytest.raises(NotImplementedError, match="attends to the empty slots of a static cache"):
            generation(lib, texts, 5, loops(), cache_implementation="static")
        ids = torch.tensor(texts)
        plain = [
            lib.generate(ids, torch.ones_like(ids), 2, **options).logits[0]
            for options in ({}, {"cache_implementation": "static"})
        ]
        assert not torch.allclose(*plain, atol=1e-2), "the Bridge is right by itself: refuse nothing"
        return
    for where in ("last", "all", "generated", slice(2, 7)):
        seen = generation(lib, texts, 5, loops(where), cache_implementation="static")
        compare(seen, lib.reference(loops(where)), forbidden=lib.forbidden)


# -- 8. beams --------------------------------------------------------------------------------------------------------


def remembering():
    """A law whose control differs with all tokens of its row so far, far from where `tanh` is flat."""
    return sl.Controller([sl.Loop(Running(0.05 * Draw(3).unit(32), 100.0, 0.0, "sum"), sl.Site(1), where="all")])


@pytest.mark.parametrize("kind", ["plain", "padded", "sampled", "uncached"])
@pytest.mark.parametrize("name", HUGGING)
def test_rows_of_a_beam_search_are_the_returned_sequences(name, kind):
    """What a law remembers goes with each of them."""
    lib, controller = library(name), remembering()
    texts = [TEXT[:4], TEXT[:7]] if kind == "padded" else [TEXT[:7]]
    options = {"num_beams": 3, "num_return_sequences": 3, "do_sample": kind == "sampled"}
    torch.manual_seed(3)
    seen = generation(lib, texts, 6, controller, use_cache=kind != "uncached", **options)
    assert moved(seen.beams)
    compare(seen, lib.reference(controller), produced="beams")


@pytest.mark.parametrize("name", HUGGING)
def test_the_memory_of_a_law_follows_the_beams(name):
    """The score of each beam is that of its tokens under a law that remembers them."""
    lib, controller = library(name), remembering()
    options = {"num_beams": 3, "num_return_sequences": 3, "output_scores": True, "length_penalty": 0.0}
    ids = torch.tensor([TEXT[:7]])
    with sl.steer(lib.model, controller):
        out = lib.generate(ids, torch.ones_like(ids), 6, **options)
    assert moved(out.beam_indices)
    for tokens, score in zip(out.sequences.tolist(), out.sequences_scores.tolist(), strict=True):
        logits = lib.reference(controller).row(tokens, 7)[0]
        found = sum(float(logits[t - 1].log_softmax(-1)[tokens[t]]) for t in range(7, 13))
        assert score == pytest.approx(found, abs=2e-4)
