"""Scored logits and generated texts against plain hooks on the Hugging Face model."""

from __future__ import annotations

import pytest
import torch

import steerlens as sl
from steerlens.core import Loop
from steerlens.evaluate import generate_texts, log_probabilities, scored_logits
from steerlens.models import tiny

ROWS = [[3, 17, 25, 29, 41], [5, 9, 12, 31, 44, 7, 8], [6, 2, 4]]
LENGTHS = [3, 2, 2]


def vector():
    return torch.randn(32, generator=torch.Generator().manual_seed(1))


def controller(where="last"):
    return sl.Controller([Loop(sl.Add(vector()), sl.Site(1, "resid_post"), where=where)])


def by_hand(row, start):
    """Logits of one row alone, the vector added to block 1's output from column `start` on."""
    model, _ = tiny(host="hf")

    def add(module, args, output):
        state = output[0] if isinstance(output, tuple) else output
        state = torch.cat([state[:, :start], state[:, start:] + vector()], dim=1)
        return (state, *output[1:]) if isinstance(output, tuple) else state

    handle = model.model.layers[1].register_forward_hook(add)
    with torch.no_grad():
        logits = model(torch.tensor([row])).logits[0]
    handle.remove()
    return logits


@pytest.mark.parametrize(("where", "offset"), [("last", -1), ("generated", 0)])
def test_completions_are_steered_as_while_they_are_generated(host, tiny_model, where, offset):
    found = scored_logits(tiny_model(host), controller(where), ROWS, LENGTHS, batch=2)
    for row, length, logits in zip(ROWS, LENGTHS, found, strict=True):
        expected = by_hand(row, max(length + offset, 1))[length - 1 :]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_scored_equals_generated(host, tiny_model):
    """The greedy choice at each scored position is the token that generation wrote there."""
    model = tiny_model(host)
    texts = generate_texts(model, controller(), ["w3 w17 w25", "w5 w9", "w8 w1 w2"], max_new_tokens=6)
    rows = [text.prompt + text.completion for text in texts]
    for text, logits in zip(texts, scored_logits(model, controller(), rows, [3, 2, 3]), strict=True):
        assert logits[:-1].argmax(-1).tolist() == list(text.completion)
        expected = by_hand([*text.prompt, *text.completion], len(text.prompt) - 1)[len(text.prompt) - 1 :]
        labels = torch.tensor(text.completion)
        own = torch.stack([row.log_softmax(-1)[label] for row, label in zip(expected[:-1], labels, strict=True)])
        torch.testing.assert_close(log_probabilities(logits, text.completion), own, rtol=1e-4, atol=1e-4)


def test_texts_come_in_the_order_of_their_prompts_and_from_their_seed(tiny_model):
    model, prompts = tiny_model("bridge"), ["w3 w17 w25", "w5 w9", "w8 w1 w2"]
    state = torch.get_rng_state()
    first = generate_texts(model, None, prompts, max_new_tokens=6, temperature=1.0, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    again = generate_texts(model, None, prompts, max_new_tokens=6, temperature=1.0, seed=3)
    other = generate_texts(model, None, prompts, max_new_tokens=6, temperature=1.0, seed=4)
    assert first == again != other
    assert [text.prompt for text in first] == [(3, 17, 25), (5, 9), (8, 1, 2)]
    zero = generate_texts(model, controller(), prompts, max_new_tokens=6, temperature=1.0, seed=3, strength=0.0)
    assert zero == first


def test_a_prompt_longer_than_its_row_is_an_error(tiny_model):
    with pytest.raises(ValueError, match="row 1 has 2 tokens and a prompt of 3"):
        scored_logits(tiny_model("bridge"), None, [[1, 2, 3], [4, 5]], [3, 3])
