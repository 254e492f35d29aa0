"""`where` by the text: markers found in decoded texts by a search that knows no table of tokens, on every host."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch

import steerlens as sl
from steerlens.marking import _turn as turn_of
from steerlens.marking import spelling
from steerlens.models import smollm2, tiny
from steerlens.testing import discover_hosts
from tests.reference import SPANS
from tests.sequence_cases import Draw, Library, compare, forward, gated, generation, loops, spans

HOSTS = discover_hosts()
HUGGING = [name for name in HOSTS if name in ("bridge", "nnsight")]


@cache
def library(name):
    return Library(name)


def inside(span, tokens):
    """What a span says of each token of a row."""
    return span.inside[span.states(torch.tensor([tokens]), None, None)[0].long()].tolist()


@pytest.mark.parametrize("number", range(6))
def test_a_span_is_what_a_search_in_the_decoded_text_finds(number):
    span, draw, seen = spans()[number], random.Random(number), set()
    for _ in range(60):
        tokens = [draw.randrange(97) for _ in range(draw.randint(1, 14))]
        expected = [SPANS[span.words](tokens[: t + 1]) for t in range(len(tokens))]
        assert inside(span, tokens) == expected, (span, tokens)
        seen |= {*expected}
    assert seen == {True, False}


@pytest.mark.parametrize("name", HOSTS)
def test_steered_by_the_text_in_padded_batches_and_generations(name):
    """Against plain hooks on one row and one token at a time; pads, and the text of a pad, count for nothing."""
    for seed, where in enumerate(spans()):
        draw, lib, controller = Draw(seed), library(name), loops(where)
        texts = [draw.text(3, 9) for _ in range(3)]
        for side in ("left", "right"):
            compare(forward(lib, texts, side, controller), lib.reference(controller))
        compare(generation(lib, texts, 6, controller), lib.reference(controller), forbidden=lib.forbidden)


@pytest.mark.parametrize("name", HUGGING)
@pytest.mark.parametrize(
    "options",
    [{"use_cache": False}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"}],
    ids=["uncached", "beams", "lookup", "static"],
)
def test_steered_by_the_text_however_it_is_generated(name, options):
    """Beams that are reordered, and candidates that are rejected with the marker in them."""
    if name == "bridge" and "cache_implementation" in options:
        pytest.skip("TransformerBridge of TransformerLens 3 attends to the empty slots of a static cache")
    for seed, where in enumerate(spans()):
        draw, lib, controller = Draw(seed), library(name), loops(where)
        texts = [draw.text(6, 6) for _ in range(1 if "prompt_lookup_num_tokens" in options else 2)]
        text = texts[0]
        if "prompt_lookup_num_tokens" in options:
            texts = [[*text[:3], *text[:3]]]  # something to look up
        seen = generation(lib, texts, 8, controller, **options)
        produced = "beams" if "num_beams" in options else "greedy"
        compare(seen, lib.reference(controller), forbidden=lib.forbidden, produced=produced)


@pytest.mark.parametrize("name", HOSTS)
def test_scored_equals_generated(name):
    lib = library(name)
    for where in spans():
        controller, text = loops(where), Draw(3).text(5, 5)
        seen = generation(lib, [text], 6, controller)
        tokens = torch.tensor([seen.tokens[0][:-1]])
        with sl.steer(lib.model, controller, record="all") as run, run.scoring(5):
            lib.logits(tokens)
        again = {site: run.record[entry.own[0]["u"]] for site, entry in run.signals.items()}
        for site, u in seen.controls.items():
            torch.testing.assert_close(again[site], u, rtol=1e-4, atol=1e-4)


def test_a_chat_goes_on_with_its_cache():
    """A marker that is completed by the second message's first token is found: the cache's text goes on."""
    lib = library("bridge")
    where = sl.after(lib.model, "w3 w17")
    SPANS[where.words] = lambda tokens: "w3 w17" in lib.model.tokenizer.decode(tokens)
    controller = gated(loops(where), threshold=-9.0)
    from transformers import DynamicCache

    cache, rows = DynamicCache(), [[5, 9, 3], [17, 4], [8]]
    text, us = [], []
    with sl.steer(lib.model, controller, record="all") as run, torch.no_grad():
        for row in rows:
            text += row
            lib.inner(input_ids=torch.tensor([row]), past_key_values=cache)
        us = {site: run.record[entry.own[0]["u"]][0] for site, entry in run.signals.items()}
    for u in us.values():
        assert [bool(row.any()) for row in u] == [False, False, False, True, True, True]


def test_a_marker_at_the_end_of_the_prompt_steers_what_it_writes():
    lib, text = library("bridge"), [5, 9, 12, 3]
    last, after = (generation(lib, [text], 5, loops(where)) for where in ("last", sl.after(lib.model, "w3")))
    assert last.tokens == after.tokens
    for site, u in last.controls.items():
        torch.testing.assert_close(u, after.controls[site], rtol=1e-4, atol=1e-4)


def test_saved_and_loaded_and_shared_by_loops(tmp_path):
    lib = library("bridge")
    where, v = sl.between(lib.model, "w2", "w"), torch.eye(32)
    controller = sl.Controller([sl.Loop(sl.Add(3 * v[layer]), layer, where=where) for layer in (1, 2)])
    path = tmp_path / "marked.safetensors"
    controller.save(path)
    loaded = sl.Controller.load(path)
    assert repr(loaded.loops[0].where) == "between('w2', 'w')"
    assert loaded.loops[0].where.same(controller.loops[0].where)
    ids = torch.tensor([[5, 20, 61, 2, 7, 7]])
    with torch.no_grad():
        with sl.steer(lib.model, controller):
            expected = lib.logits(ids)
        with sl.steer(lib.model, loaded):
            assert torch.equal(lib.logits(ids), expected)


def test_what_cannot_be_found_is_refused():
    lib = library("bridge")
    with pytest.raises(ValueError, match="no tokens of the model spell the marker 'x'"):
        sl.after(lib.model, "x")
    with pytest.raises(ValueError, match="at least one character"):
        sl.until(lib.model, "")
    with pytest.raises(ValueError, match="needs a chat template"):
        sl.assistant(lib.model)
    controller = loops(sl.after(lib.model, "w3"))
    with pytest.raises(ValueError, match="which a hook does not see"):
        controller.fwd_hooks()
    embeddings = lib.inner.get_input_embeddings()(torch.tensor([[3, 4]])).detach()
    with sl.steer(lib.model, controller), pytest.raises(RuntimeError, match="was given none"):
        lib.inner(inputs_embeds=embeddings)
    with torch.no_grad():
        begun = lib.inner(input_ids=torch.tensor([[3, 4]]), use_cache=True).past_key_values
    with sl.steer(lib.model, controller), pytest.raises(RuntimeError, match="2 of its tokens went through the"):
        lib.inner(input_ids=torch.tensor([[3]]), past_key_values=begun)


USER = "{% for m in messages %}{% if m.role == 'user' %}"
BY_TURN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "turn"),
    [
        # nothing is added for an answer, and a space comes with it
        (USER + "[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} <eos>{% endif %}{% endfor %}", " [/INST]"),
        # the answer begins with a space
        (USER + "Q: {{ m.content }}{% else %} A: {{ m.content }}<eos>{% endif %}{% endfor %}", " A:"),
        # thoughts are asked for and left out afterwards; the text ends where none is asked for
        (BY_TURN, "<|assistant|>"),
    ],
)
def test_an_answer_begins_where_it_is_asked_for(template, turn):
    """What begins a turn stands in the chat with the answer, and in what the answer is generated from."""
    tokenizer = tiny(host="bridge").tokenizer
    asks = "<|assistant|><think>" if template == BY_TURN else " A:" if "Q:" in template else ""
    ends = "<eos>" if template == BY_TURN else ""
    tokenizer.chat_template = template + "{% if add_generation_prompt %}" + asks + "{% else %}" + ends + "{% endif %}"
    start, end = turn_of(tokenizer)
    assert start.endswith(turn)
    chat = [{"role": role, "content": text} for role, text in [("user", "q"), ("assistant", "ok"), ("user", "r")]]
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    begun = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert whole.partition(start)[2].partition(end)[0].strip() == "ok"
    assert begun.partition(start)[1:] in ((start, ""), (start, "<think>"))


@pytest.mark.real_model
def test_a_byte_level_tokenizer():
    """Every way to split a text finds the marker where the text has it, inside a token and across characters, too."""
    model = smollm2()
    tokenizer = model.tokenizer
    spelled = spelling(tokenizer)
    assert (
        b"".join(spelled[token] for token in tokenizer("naïve </think>\n日本")["input_ids"])
        .decode()
        .endswith("naïve </think>\n日本")
    )
    span = sl.after(model, "</think>", inclusive=False)
    text = "So <think>hm</think>\n\nWell, </think> again"
    ways = [
        tokenizer(text)["input_ids"],
        [token for letter in text for token in tokenizer(letter, add_special_tokens=False)["input_ids"]],
    ]
    for tokens in ways:
        whole = [tokenizer.decode(tokens[: t + 1]) for t in range(len(tokens))]
        first = next(t for t, part in enumerate(whole) if "</think>" in part)
        assert inside(span, tokens) == [t > first for t in range(len(tokens))]
    # the last byte of a character that several tokens spell
    span = sl.until(model, "本")
    tokens = tokenizer("日本 is")["input_ids"]
    whole = [tokenizer.decode(tokens[: t + 1]) for t in range(len(tokens))]
    assert inside(span, tokens) == ["本" not in part for part in whole]
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chat = [{"role": r, "content": c} for r, c in [("user", "Hi"), ("assistant", "Yes sir"), ("user", "Go")]]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    marked = inside(sl.assistant(model, inclusive=False), tokens)
    assert tokenizer.decode([token for token, flag in zip(tokens, marked, strict=True) if flag]) == "Yes sir"
