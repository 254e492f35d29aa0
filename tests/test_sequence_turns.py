"""Caches that are kept, cut, repeated and read in turn, loops by hand, and ways to generate that are refused."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import steerlens as sl
from steerlens.models import tiny
from steerlens.models.wrap import wrap
from steerlens.testing import discover_hosts, padding
from tests.architectures import build, tokenizer
from tests.sequence_cases import PAD, Draw, Library, Seen, batch_of, compare, controls_of, gated, generation, loops
from tests.test_sequences import REPEATING, TEXT, new_cache, words

HOSTS = discover_hosts()
HUGGING = [name for name in ("bridge", "nnsight") if name in HOSTS]
LENS = [name for name in ("lens", "hooked") if {"lens": "bridge"}.get(name, name) in HOSTS]
NNSIGHT = [name for name in ("nnsight",) if name in HOSTS]


@cache
def library(name, family="llama"):
    return Library(name, family)


def everything(where):
    """A gate behind the first control, open, and a schedule if `where` has tokens after the prompt."""
    controller = gated(loops(where), threshold=-9.0)
    return controller if where in ("prompt", "last_prompt") else sl.schedule(controller, [1.0, 0.5, 0.8])


# -- 2. a kept cache, with what is decided about the prompt -----------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 2], ids=["before", "behind"])
@pytest.mark.parametrize("name", HOSTS)
def test_a_gate_decides_anew_on_the_whole_text_with_each_part_of_a_prompt(name, layer):
    """Also behind the first control, whose unsteered states are read from a text that was steered."""
    lib, decided = library(name), set()
    for first, where in ((3, "last"), (60, "all"), (71, "all")):
        controller = gated(loops(where), layer=layer)
        with torch.no_grad(), sl.steer(lib.model, controller, record="all"):
            kept, text = new_cache(lib), [first, *TEXT[1:6]]
            logits = [lib.logits(torch.tensor([text]), **kept)[0]]
            for part in ([11], [12], [50, 3 * first % 97], [13]):
                text += part
                logits.append(lib.logits(torch.tensor([part]), **kept)[0])
        reference = lib.reference(controller)
        wanted, _ = reference.row(text, [6] * 8 + [10] * 3)
        torch.testing.assert_close(torch.cat(logits), wanted, rtol=1e-3, atol=1e-3)
        (gate,) = controller.loops[0].gates
        decided.add((reference._decide(gate, text[:6], 0), reference._decide(gate, text[:10], 0)))
    assert len(decided) > 1


@pytest.mark.parametrize("where", ["last", "all", "prompt"])
@pytest.mark.parametrize("name", HUGGING)
def test_a_cropped_cache_generates_the_same_again(name, where):
    from transformers import DynamicCache

    lib, controller = library(name), everything(where)
    ids, kept = torch.tensor([TEXT[:6]]), DynamicCache(config=library(name).inner.config)
    with sl.steer(lib.model, controller, record="all") as run:
        first = lib.generate(ids, torch.ones_like(ids), 3, past_key_values=kept)
        kept.crop(5 - kept.get_seq_length())
        again = lib.generate(ids, torch.ones_like(ids), 3, past_key_values=kept)
        controls = controls_of(run)
    assert torch.equal(first.sequences, again.sequences)
    found = {(0, 5 + step): values[0] for step, values in enumerate(again.logits)}
    seen = Seen(run, again.sequences.tolist(), [6], [0], found, controls)
    compare(seen, lib.reference(controller), forbidden=lib.forbidden)


@pytest.mark.parametrize("name", HUGGING)
def test_a_prefix_read_once_and_repeated_is_continued_in_each_row(name):
    lib, prompts = library(name), [[*TEXT[:4], 60, 61], [*TEXT[:4], 9, 70]]
    for where in ("last", "all", slice(2, 7)):
        controller = everything(where)
        with torch.no_grad(), sl.steer(lib.model, controller, record="all"):
            kept = new_cache(lib)
            lib.logits(torch.tensor([TEXT[:4]]), **kept)
            kept["past_key_values"].batch_repeat_interleave(2)
            ids = torch.tensor(prompts)
            out = lib.generate(ids, torch.ones_like(ids), 3, past_key_values=kept["past_key_values"])
        for row, tokens in enumerate(out.sequences.tolist()):
            wanted, _ = lib.reference(controller).row(tokens, [4] * 4 + [6] * 5)
            found = torch.stack([values[row] for values in out.logits])
            torch.testing.assert_close(found, wanted[5:8], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", HUGGING)
def test_a_static_cache_that_is_reset_begins_a_new_sequence(name):
    from transformers import StaticCache

    lib, controller = library(name, "gemma"), everything("last")
    kept = StaticCache(config=lib.inner.config, max_cache_len=40)
    with sl.steer(lib.model, controller, record="all") as run:
        for text in (TEXT[:6], TEXT[3:8]):
            kept.reset()
            ids = torch.tensor([text])
            out = lib.generate(ids, torch.ones_like(ids), 4, past_key_values=kept)
            found = {(0, len(text) - 1 + step): values[0] for step, values in enumerate(out.logits)}
            seen = Seen(run, out.sequences.tolist(), [len(text)], [0], found, controls_of(run))
            compare(seen, lib.reference(controller), forbidden=lib.forbidden)


# -- 4. and 5. other drafts, other texts ------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["last", "all"])
@pytest.mark.parametrize("name", HUGGING)
def test_a_model_that_drafts_for_itself_decodes_greedily(name, where):
    """Its drafts are steered generations of their own."""
    lib, controller = library(name), gated(loops(where, size=1.0), threshold=-9.0)
    seen = generation(lib, [REPEATING], 6, controller, assistant_model=lib.inner)
    seen.logits, seen.controls = {}, {}
    compare(seen, lib.reference(controller), forbidden=lib.forbidden)


@pytest.mark.parametrize("name", HUGGING)
def test_drafts_of_the_first_blocks_are_greedy_decoding_or_refused(name):
    lib, controller = library(name), loops("last")
    if name == "nnsight":
        with pytest.raises(NotImplementedError, match="assistant_early_exit runs the first blocks by themselves"):
            generation(lib, [REPEATING], 6, controller, assistant_early_exit=2)
        seen = generation(lib, [REPEATING], 6, controller)
    else:
        seen = generation(lib, [REPEATING], 6, controller, assistant_early_exit=2)
    seen.logits, seen.controls = {}, {}
    compare(seen, lib.reference(controller), forbidden=lib.forbidden)


@pytest.mark.parametrize("where", ["last", "generated", "all"])
@pytest.mark.parametrize("name", HUGGING)
def test_guidance_by_a_prompt_of_its_own_steers_both_texts_by_their_own_positions(name, where):
    lib, controller, scale, negative = library(name), loops(where), 1.7, [5, 9, 11, 60]
    ids = torch.tensor([TEXT])
    options = {"guidance_scale": scale, "negative_prompt_ids": torch.tensor([negative])}
    for cached in (True, False):
        with sl.steer(lib.model, controller):
            out = lib.generate(ids, torch.ones_like(ids), 4, use_cache=cached, **options)
        tokens, reference = out.sequences[0].tolist(), lib.reference(controller)
        given = reference.row(tokens, len(TEXT))[0].log_softmax(-1)[len(TEXT) - 1 : -1]
        other = reference.row(negative + tokens[len(TEXT) :], len(negative))[0].log_softmax(-1)[3:-1]
        mixed = scale * (given - other) + other
        mixed[:, lib.forbidden] = -torch.inf
        short_of = mixed.max(-1).values - mixed.gather(1, out.sequences[0, len(TEXT) :, None])[:, 0]
        assert (short_of < 1e-3).all(), f"use_cache={cached}: {short_of.tolist()}"


@pytest.mark.parametrize("name", LENS)
def test_two_streams_read_in_turn_keep_their_own_gates(name):
    lib, controller = library(name), gated(loops("generated"))
    texts, fixed = [TEXT[:6], [7, 8, 9, 10, 11, 12]], {"max_new_tokens": 6, "do_sample": False, "stop_at_eos": False}
    fixed["verbose"] = False
    with torch.no_grad(), sl.steer(lib.model, controller):
        wanted = [lib.model.generate(torch.tensor([text]), **fixed)[0, -6:] for text in texts]
        options = fixed | {"max_tokens_per_yield": 1, "return_type": "tokens"}
        streams = [lib.model.generate_stream(torch.tensor([text]), **options) for text in texts]
        parts = list(zip(*streams, strict=True))
    for index, expected in enumerate(wanted):
        assert torch.equal(torch.cat([part[index] for part in parts], 1)[0, -6:], expected)


# -- loops by hand ----------------------------------------------------------------------------------------------------


def by_hand(lib, texts, side, controller, count):
    """A batch that is decoded greedily by a loop of the user's own; each row's tokens and logits, and the controls."""
    ids, mask, starts = batch_of(texts, side)
    tokens, found, step_ids = [list(text) for text in texts], {}, ids
    with torch.no_grad(), padding(lib.model, side), sl.steer(lib.model, controller, record="all") as run:
        kept = new_cache(lib, len(texts))
        for step in range(count + 1):
            if lib.name == "hooked":
                logits = lib.model(step_ids, attention_mask=mask[:, -step_ids.shape[1] :], **kept)
            else:
                positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -step_ids.shape[1] :]
                logits = lib.logits(step_ids, mask, position_ids=positions, **kept)
            for row, text in enumerate(texts):
                if step == 0:
                    found |= {(row, t): logits[row, starts[row] + t] for t in range(len(text))}
                found[row, len(tokens[row]) - 1] = logits[row, starts[row] + len(text) - 1 if step == 0 else -1]
            if step < count:
                for row, written in enumerate(tokens):
                    written.append(int(found[row, len(written) - 1].argmax()))
                step_ids = torch.tensor([[written[-1]] for written in tokens])
                mask = torch.cat([mask, torch.ones_like(step_ids)], 1)
        controls = controls_of(run)
    # pads behind a short prompt are left out, so that a row's columns are its tokens
    for site, u in controls.items():
        rows = [
            torch.cat([u[row, starts[row] :][: len(text)], u[row, ids.shape[1] :]]) for row, text in enumerate(texts)
        ]
        controls[site] = rows
    return Seen(run, tokens, [len(text) for text in texts], [0] * len(texts), found, controls)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", HOSTS)
def test_a_loop_by_hand_is_steered_as_generate_is(name, side):
    if (name, side) == ("hooked", "right"):
        pytest.skip("a HookedTransformer that pads on the right cannot go on after the pads")
    for family in ("llama", "gpt2"):
        lib = library(name, family)
        for where in ("last", "all", "generated", "prompt", slice(-2, 7)):
            controller = everything(where)
            seen = by_hand(lib, [TEXT[:3], TEXT[:6], [5]], side, controller, 3)
            for row, (tokens, prompt) in enumerate(zip(seen.tokens, seen.prompts, strict=True)):
                wanted, u = lib.reference(controller).row(tokens, prompt, row)
                for (which, position), logits in seen.logits.items():
                    if which == row:
                        torch.testing.assert_close(logits, wanted[position], rtol=1e-3, atol=1e-3)
                for site, values in u.items():
                    torch.testing.assert_close(seen.controls[site][row], values, rtol=1e-3, atol=1e-3)


# -- what is refused, and what is left alone --------------------------------------------------------------------------


@pytest.mark.parametrize("name", HUGGING)
def test_texts_packed_into_one_row_are_refused(name):
    """By hand, and by the three entrances of transformers' continuous batching."""
    lib = library(name)
    ids, positions = torch.tensor([TEXT[:9]]), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with torch.no_grad(), sl.steer(lib.model, loops("all")):
        if name == "bridge":  # nnsight gives every pass a mask, with which transformers takes a row for one text
            with pytest.raises(NotImplementedError, match="several texts packed into one row cannot be steered"):
                lib.logits(ids, position_ids=positions, use_cache=False)
        whole = lib.logits(ids, position_ids=torch.arange(9)[None], use_cache=False)
        torch.testing.assert_close(whole, lib.logits(ids, use_cache=False))
        for way in ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"):
            with pytest.raises(NotImplementedError, match=f"{way}.* packs texts into one row"):
                getattr(lib.inner, way)([TEXT[:4]])
    assert not {"generate_batch", "init_continuous_batching"} & set(vars(lib.inner))


@pytest.mark.parametrize("name", NNSIGHT)
def test_a_scan_of_a_steered_model_gives_its_shapes(name):
    lib, controller = library(name), loops("last")
    with sl.steer(lib.model, controller, record="all"):
        with lib.model.scan(words(TEXT[:4])):
            state = lib.model.model.layers[2].output.save()
        logits = lib.logits(torch.tensor([TEXT]))
    assert tuple(state.shape) == (1, 4, 32)
    torch.testing.assert_close(logits[0], lib.reference(controller).row(TEXT, len(TEXT))[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NNSIGHT)
def test_invokes_of_unequal_length_in_one_generation_are_steered_each_by_itself(name):
    lib, texts = library(name), [TEXT[:4], TEXT[:7]]
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": PAD}
    for where in ("last", "all", slice(-2, 6)):
        controller = everything(where)
        run = sl.steer(lib.model, controller)
        with lib.model.generate(**options, output_logits=True, return_dict_in_generate=True) as tracer:
            with tracer.invoke(words(texts[0])):
                pass
            with tracer.invoke(words(texts[1])):
                pass
            with tracer.invoke():
                out = tracer.result.save()
        run.remove()
        for row, text in enumerate(texts):
            tokens = out.sequences[row, -len(text) - 3 :].tolist()
            wanted, _ = lib.reference(controller).row(tokens, len(text))
            found = torch.stack([values[row] for values in out.logits])
            torch.testing.assert_close(found, wanted[len(text) - 1 : -1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NNSIGHT)
@pytest.mark.parametrize("kind", ["chunks", "lookup", "assistant", "static", "beams", "uncached"])
def test_apply_follows_every_way_to_generate(name, kind):
    lib = library(name)
    options = {
        "chunks": {"prefill_chunk_size": 3},
        "lookup": {"prompt_lookup_num_tokens": 3},
        "assistant": {"assistant_model": tiny("llama", host="hf", seed=0)[0]},
        "static": {"cache_implementation": "static"},
        "beams": {"num_beams": 3},
        "uncached": {"use_cache": False},
    }[kind]
    fixed = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": PAD}
    sites = {sl.Site(1): "blocks.1.hook_steer_u", sl.Site(2, "resid_pre"): "blocks.2.hook_steer_u"}
    for where in ("last", "all", slice(2, 7)):
        controller = loops(where)
        with lib.model.generate(torch.tensor([REPEATING]), **fixed, **options) as tracer:
            applied = sl.apply(lib.model, controller, record="all")
            out = tracer.result.save()
        controls = {site: applied.record[hook][:, : out.shape[1] - 1].clone() for site, hook in sites.items()}
        seen = Seen(applied, out.tolist(), [len(REPEATING)], [0], {}, controls)
        compare(seen, lib.reference(controller), produced="beams" if kind == "beams" else "greedy", forbidden=99)


@pytest.mark.parametrize("name", HUGGING)
def test_beams_with_everything_at_once(name):
    """Several rows a prompt, unequal prompts, a gate, a schedule, with a cache, without, with a static one."""
    lib = library(name)
    for where, returned, options in (
        ("last", 2, {}),
        ("all", 4, {"use_cache": False}),
        (slice(-2, None), 1, {"cache_implementation": "static"}),
    ):
        controller = everything(where)
        seen = generation(
            lib, [TEXT[:3], TEXT[:7]], 5, controller, num_beams=4, num_return_sequences=returned, **options
        )
        compare(seen, lib.reference(controller), produced="beams")


# -- 15. a decoder called by its head, blocks run twice ---------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", HUGGING)
def test_rows_of_opt_are_steered_as_each_alone(name, side):
    """Its head calls the decoder, not the base model, and its positions come from the mask."""
    plain, texts, vector = build("opt"), [TEXT[:4], TEXT[:7]], 3 * Draw(1).unit(32)
    model = wrap(name, "tests/opt", build("opt"), tokenizer(), processed=False, prepend_bos=False)
    inner = model.original_model if name == "bridge" else model._module
    ids, mask, starts = batch_of(texts, side)

    def add(module, args, output):
        state = output[0] if isinstance(output, tuple) else output
        state = torch.cat([state[:, :1], state[:, 1:] + vector], 1)  # position 0 is left alone
        return (state, *output[1:]) if isinstance(output, tuple) else state

    controller = sl.Controller([sl.Loop(sl.Add(vector), sl.Site(1), where="all")])
    with torch.no_grad(), sl.steer(model, controller):
        if name == "nnsight":
            with model.trace({"input_ids": ids, "attention_mask": mask}):
                logits = model.output.logits.save()
        else:
            logits = inner(input_ids=ids, attention_mask=mask).logits
    handle = plain.model.decoder.layers[1].register_forward_hook(add)
    with torch.no_grad():
        for row, text in enumerate(texts):
            wanted = plain(torch.tensor([text])).logits[0]
            found = logits[row, starts[row] : starts[row] + len(text)]
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    handle.remove()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", [name for name in HUGGING if name == "bridge"])
def test_checkpointing_of_either_kind_changes_no_gradient(name, reentrant):
    """With and without signals recorded, which the second run of a block must not record again."""
    found = []
    for on, record in ((False, None), (True, None), (True, "all")):
        lib, vector = Library(name), torch.zeros(32, requires_grad=True)
        controller = sl.Controller([sl.Loop(sl.Add(vector), sl.Site(1), where="all")])
        if on:
            lib.inner.gradient_checkpointing_enable({"use_reentrant": reentrant})
            lib.inner.train()
        with torch.enable_grad(), sl.steer(lib.model, controller, record=record) as run:
            lib.inner(input_ids=torch.tensor([TEXT]), use_cache=False).logits[0, -1].square().mean().backward()
            if record:
                assert run.record["blocks.1.hook_steer_u"].shape == (1, len(TEXT), 32)
        found.append(vector.grad)
    assert found[0].any()
    for gradient in found[1:]:
        torch.testing.assert_close(gradient, found[0])
