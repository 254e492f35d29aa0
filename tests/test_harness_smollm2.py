"""The harness adapters on a real model, against Hugging Face with a plain forward hook."""

from __future__ import annotations

from contextlib import contextmanager

import anyio
import pytest
import torch

import steerlens as sl
from steerlens.models import smollm2

pytest.importorskip("lm_eval", reason="needs lm-eval, which the extra `eval` installs")
pytest.importorskip("inspect_ai", reason="needs inspect-ai, which the extra `eval` installs")

from inspect_ai.model import ChatMessageUser, GenerateConfig
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from steerlens.evaluate.inspect_ai import as_inspect_model
from steerlens.evaluate.lm_eval import SteeredLM

pytestmark = pytest.mark.real_model
LAYER, COUNT = 14, 6
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def plain():
    return smollm2(host="hf")


@pytest.fixture(scope="module")
def requests():
    """A delighted and an appalled ending each of three shipped prompts."""
    pairs = sl.shipped("sentiment", split="held_out")[:3]
    texts = [text for pair in zip(pairs.positive, pairs.negative, strict=True) for text in pair]
    return [Instance("loglikelihood", {}, text, 0) for text in texts]


@pytest.fixture(scope="module")
def steering(host, smol):
    return sl.caa(smol(host), sl.shipped("sentiment", split="dev", read="mean")[:8], layers=LAYER, strength=2.0)


@contextmanager
def hooked(model, vector, start):
    """Adds a vector to a block's output from a column on."""

    def add(module, args, output):
        state = output[0] if isinstance(output, tuple) else output
        state = torch.cat([state[:, :start], state[:, start:] + vector], dim=1)
        return (state, *output[1:]) if isinstance(output, tuple) else state

    handle = model.model.layers[LAYER].register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def vector_of(controller):
    (loop,) = controller.loops
    assert str(loop.act) == f"blocks.{LAYER}.hook_resid_post"
    return loop.strength * loop.law.vector


def by_hand(plain, vector, prompt, completion):
    model, tokenizer = plain
    head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    row = tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
    with torch.no_grad(), hooked(model, vector, len(head) - 1):
        levels = model(torch.tensor([row])).logits[0].double().log_softmax(-1)
    return sum(float(levels[column - 1, row[column]]) for column in range(len(head), len(row)))


def test_lm_eval_scores_what_hugging_face_scores_with_a_hook(host, smol, plain, requests, steering):
    model, tokenizer = plain
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2).loglikelihood(requests, disable_tqdm=True)
    unsteered = SteeredLM(smol(host)).loglikelihood(requests)
    steered = SteeredLM(smol(host), steering).loglikelihood(requests)
    # sums over a dozen tokens of rounding in float32
    assert [value for value, _ in unsteered] == pytest.approx([value for value, _ in theirs], abs=2e-3)
    assert [greedy for _, greedy in unsteered] == [greedy for _, greedy in theirs]
    expected = [by_hand(plain, vector_of(steering), *request.args) for request in requests]
    assert [value for value, _ in steered] == pytest.approx(expected, abs=2e-3)
    # twice the mean difference of delight makes the delighted ending likelier than the appalled one, in each pair
    margins = [
        [values[index][0] - values[index + 1][0] for index in range(0, len(requests), 2)]
        for values in (unsteered, steered)
    ]
    assert all(after > before + 0.5 for before, after in zip(*margins, strict=True))


def test_inspect_answers_what_hugging_face_writes_with_a_hook(host, smol, plain, steering):
    model, tokenizer = plain
    chat = [{"role": "user", "content": QUESTION}]
    ids = list(
        tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, return_dict=True)["input_ids"]
    )
    strong = steering * 4.0

    def written(vector):
        # the last prompt token, then each new token, which with a cache is the only one of its pass
        with torch.no_grad(), hooked(model, vector, -1):
            row = model.generate(torch.tensor([ids]), max_new_tokens=COUNT, do_sample=False)[0, len(ids) :]
        return tokenizer.decode(row, skip_special_tokens=True)

    async def ask(own):
        config = GenerateConfig(max_tokens=COUNT)
        return (await own.generate([ChatMessageUser(content=QUESTION)], config=config)).completion

    answers = [anyio.run(ask, as_inspect_model(smol(host), steered)) for steered in (None, strong)]
    assert answers == [written(torch.zeros(())), written(vector_of(strong))]
    assert answers[0] != answers[1]
