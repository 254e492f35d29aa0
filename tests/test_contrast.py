"""Contrast data: what is read, and that it is read alike on every host."""

from __future__ import annotations

import pytest
import torch

import steerlens as sl
from steerlens.fit.contrast import tokenize
from steerlens.hosts import host_of


@pytest.fixture(scope="module")
def adapter(host, tiny_model):
    return host_of(tiny_model(host))


def test_readings(adapter):
    pair = [("w1 w2 w3", " w4 w5")]
    for read, expected in (
        ("last", [0, 0, 0, 0, 1]),
        ("mean", [0, 0.25, 0.25, 0.25, 0.25]),
        ("completion", [0, 0, 0, 0.5, 0.5]),
        (2, [0, 0, 1, 0, 0]),
        (-2, [0, 0, 0, 1, 0]),
    ):
        side, _ = sl.Pairs(pair, pair, read=read).sides(adapter)
        assert side.tokens == [[1, 2, 3, 4, 5]]
        assert side.weights == [expected]


def test_bos_is_prepended_as_asked_and_otherwise_as_the_host_does(adapter):
    assert tokenize("w1 w2", adapter, None)[0] == [1, 2]
    assert tokenize("w1 w2", adapter, True)[0] == [98, 1, 2]
    assert tokenize(torch.tensor([7, 8]), adapter, True)[0] == [7, 8]


def test_texts_and_token_ids_give_one_controller(host, tiny_model):
    model = tiny_model(host)
    words = sl.caa(model, sl.Pairs(["w1 w2 w3"], ["w4 w5 w6"]))
    ids = sl.caa(model, sl.Pairs([[1, 2, 3]], [[4, 5, 6]]))
    assert torch.equal(words.loops[0].law.vector, ids.loops[0].law.vector)


def test_a_tuple_holds_two_strings_or_two_lists_of_ids(adapter):
    assert tokenize(([1, 2], [3]), adapter, True) == ([1, 2, 3], 2)
    for wrong in ((1, 2), ("w1", [2]), ([1], ["w2"]), ([1], [2], [3])):
        with pytest.raises(ValueError, match="two strings or two lists of ids"):
            sl.Pairs([wrong], [[4]])
    with pytest.raises(ValueError, match="positive text 0 is empty"):
        sl.Pairs([([], [])], [[4]])


def test_pads_of_a_batch_are_never_read(host, tiny_model):
    model = tiny_model(host)
    together = sl.caa(model, sl.Pairs([[1, 2, 3, 4, 5, 6, 7], [8, 9]], [[4, 5, 6], [10, 11, 12]]))
    reads = [sl.caa(model, sl.Pairs([p], [n])) for p, n in (([1, 2, 3, 4, 5, 6, 7], [4, 5, 6]), ([8, 9], [10, 11, 12]))]
    mean = torch.stack([controller.loops[0].law.vector for controller in reads]).mean(0)
    torch.testing.assert_close(together.loops[0].law.vector, mean, rtol=1e-4, atol=1e-5)


@pytest.mark.real_model
def test_chat_messages_go_through_the_template(smol):
    adapter = host_of(smol("nnsight"))
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Good day"}]
    ids, prompt = tokenize(chat, adapter)
    tail = adapter.tokenizer.decode(ids[prompt:])
    assert tail.startswith("Good day")
    assert adapter.tokenizer.decode(ids[:prompt]).endswith("<|im_start|>assistant\n")


def test_the_digest_tells_data_apart():
    a, b = sl.Pairs(["x"], ["y"]), sl.Pairs(["x"], ["y"], read="mean")
    assert a.digest() == sl.Pairs(["x"], ["y"]).digest() != b.digest()


def test_strings_in_place_of_lists_are_refused():
    with pytest.raises(TypeError, match=r"positive is a single string; give a list of texts: \['I love it'\]"):
        sl.Pairs("I love it", "I hate it")
    for ids in ([1.5, 2.0], torch.tensor([1.0, 2.0]), [True, False], [1, 2.5]):
        with pytest.raises(ValueError, match="positive text 0 is"):
            sl.Pairs([ids], [[1, 2]])
    import numpy

    assert len(sl.Pairs([list(numpy.arange(3))], [[1, 2]])) == 1


def test_messages_that_end_with_the_user_are_read_where_an_answer_begins(host, tiny_model):
    model = tiny_model(host)
    tokenizer = host_of(model).tokenizer
    before = tokenizer.chat_template
    begun = "{% if add_generation_prompt %}w9{% endif %}"
    tokenizer.chat_template = "{% for message in messages %}w1 {{ message['content'] }} w2 {% endfor %}" + begun
    try:
        chat = [[{"role": "user", "content": "w5"}]]
        for asked, expected in ((True, [1, 5, 2, 9]), (False, [1, 5, 2])):
            side, _ = sl.Pairs(chat, chat, generation_prompt=asked)[:1].sides(host_of(model))
            assert side.tokens == [expected]
            assert side.weights == [[0.0] * (len(expected) - 1) + [1.0]]
        answered = [[*chat[0], {"role": "assistant", "content": "w6"}]]
        assert sl.Pairs(answered, answered).sides(host_of(model))[0].tokens == [[1, 5, 2, 1, 6, 2]]
        assert sl.Pairs(chat, chat).digest() != sl.Pairs(chat, chat, generation_prompt=False).digest()
    finally:
        tokenizer.chat_template = before
