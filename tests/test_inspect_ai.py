"""inspect-ai over a steered model: offline, on a task defined here."""

from __future__ import annotations

import pytest
import torch

import steerlens as sl
from steerlens.hosts import host_of
from steerlens.models import tiny

pytest.importorskip("inspect_ai", reason="needs inspect-ai, which the extra `eval` installs")

import anyio
from inspect_ai import Task
from inspect_ai import eval as inspect_eval
from inspect_ai.dataset import Sample
from inspect_ai.model import ChatMessageUser, GenerateConfig
from inspect_ai.scorer import includes

from steerlens.evaluate.inspect_ai import HONOURED, INSPECTS, NEUTRAL, as_inspect_model, check

TEMPLATE = "{% for m in messages %}w1 {{ m.content }} {% endfor %}w2"

#: Every option of inspect-ai 0.3.285 that a steered model refuses, with a value that would change the answer.
REFUSED = {
    "top_p": 0.9,
    "top_k": 5,
    "best_of": 3,
    "num_choices": 2,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "logit_bias": {5: 1.0},
    "prompt_logprobs": 1,
    "parallel_tool_calls": True,
    "internal_tools": True,
    "cache_prompt": True,
    "fallback_models": ["other"],
    "verbosity": "low",
    "effort": "low",
    "reasoning_effort": "low",
    "reasoning_mode": "pro",
    "reasoning_tokens": 10,
    "reasoning_summary": "auto",
    "response_schema": {"name": "x", "json_schema": {"type": "object"}},
    "extra_headers": {"a": "b"},
    "extra_body": {"a": 1},
    "modalities": ["image"],
    "batch": True,
}


@pytest.fixture(scope="module")
def model(host):
    built = tiny("llama", host=host)
    built.tokenizer.chat_template = TEMPLATE
    return built


@pytest.fixture(scope="module")
def controller(model):
    return sl.caa(model, sl.Pairs(["w1 w2 w3"], ["w4 w5 w6"]), layers=[2])


def ask(model, *prompts: str, **options):
    """Answers to prompts that are asked at the same time."""
    found = {}

    async def one(prompt: str) -> None:
        found[prompt] = await model.generate([ChatMessageUser(content=prompt)], config=GenerateConfig(**options))

    async def everybody() -> None:
        async with anyio.create_task_group() as group:
            for prompt in prompts:
                group.start_soon(one, prompt)

    anyio.run(everybody)
    return [found[prompt] for prompt in prompts]


def own(model, controller, prompt: str, count: int) -> list[int]:
    """What the steered model itself writes after a prompt of the template."""
    ids = [1, *(int(word[1:]) for word in prompt.split()), 2]
    with torch.no_grad(), sl.steer(model, controller, record=None):
        row = host_of(model).sample(torch.tensor([ids]), count, temperature=0.0)[0, len(ids) :].tolist()
    return row[: row.index(99)] if 99 in row else row


def test_every_option_is_honoured_refused_or_inspects_own():
    fields = set(GenerateConfig.model_fields)
    assert fields == HONOURED | INSPECTS | set(REFUSED)
    assert not HONOURED & INSPECTS
    assert set(NEUTRAL) <= set(REFUSED)
    check(GenerateConfig(max_tokens=4, temperature=0.5, stop_seqs=["x"], seed=1, logprobs=True, timeout=3, **NEUTRAL))
    for name, value in REFUSED.items():
        with pytest.raises(NotImplementedError, match=f"does not honour {name}="):
            check(GenerateConfig(**{name: value}))


def test_answers_are_the_steered_models_own(model, controller):
    prompts = ["w5 w6", "w7 w8", "w20 w21 w22", "w9"]
    steered, plain = (ask(as_inspect_model(model, c), *prompts, max_tokens=6) for c in (controller, None))
    for prompt, output in zip(prompts, steered, strict=True):
        tokens = own(model, controller, prompt, 6)
        assert output.completion == host_of(model).tokenizer.decode(tokens, skip_special_tokens=True)
        assert output.usage.output_tokens == len(tokens)
    assert [output.completion for output in steered] != [output.completion for output in plain]


def test_requests_of_one_moment_are_one_batch(model, controller):
    steered = as_inspect_model(model, controller)
    calls = []
    batch = type(steered.api)._batch

    def counted(part):
        calls.append(len(part))
        return batch(steered.api, part)

    steered.api._batch = counted
    ask(steered, "w5 w6", "w7 w8", "w9 w10", "w3", max_tokens=3)
    assert sorted(calls) == [1, 3]


def test_a_seed_gives_one_answer_whoever_else_asks(model, controller):
    steered = as_inspect_model(model, controller)
    options = {"max_tokens": 8, "temperature": 1.5, "seed": 3}
    (alone,) = ask(steered, "w5 w6", **options)
    together = ask(steered, "w7 w8", "w5 w6", "w9 w10", **options)
    (other,) = ask(steered, "w5 w6", max_tokens=8, temperature=1.5, seed=4)
    assert together[1].completion == alone.completion != other.completion


def test_a_stop_string_ends_the_answer(model, controller):
    steered = as_inspect_model(model, controller)
    (whole,) = ask(steered, "w5 w6", max_tokens=6)
    words = whole.completion.split()
    assert len(words) >= 2
    (short,) = ask(steered, "w5 w6", max_tokens=6, stop_seqs=[words[1]])
    assert short.completion == whole.completion[: whole.completion.index(words[1])]
    assert short.stop_reason == "stop"
    assert whole.stop_reason == ("max_tokens" if whole.usage.output_tokens == 6 else "stop")


def test_log_probabilities_are_those_of_the_steered_model(model, controller):
    (output,) = ask(as_inspect_model(model, controller), "w5 w6", max_tokens=5, logprobs=True, top_logprobs=3)
    ids = [1, 5, 6, 2]
    tokens = own(model, controller, "w5 w6", 5)
    content = output.choices[0].logprobs.content
    assert len(content) == len(tokens) > 0
    for token, found in zip(tokens, content, strict=True):
        # one forward pass a token, without a cache, steered from the last prompt token on
        with torch.no_grad(), sl.steer(model, controller, where=slice(3, None), record=None):
            levels = host_of(model).logits(torch.tensor([ids]))[0, -1].log_softmax(-1)
        assert found.logprob == pytest.approx(float(levels[token]), abs=1e-4)
        assert [top.logprob for top in found.top_logprobs] == pytest.approx(levels.topk(3).values.tolist(), abs=1e-4)
        ids.append(token)


def test_a_task_runs_and_the_signals_are_in_its_log(model, controller, tmp_path):
    task = Task(dataset=[Sample("w5 w6", target="w"), Sample("w7 w8 w9", target="w")], scorer=includes())
    steered = as_inspect_model(model, controller, config=GenerateConfig(max_tokens=4))
    (log,) = inspect_eval(task, model=steered, log_dir=str(tmp_path), display="none")
    assert log.status == "success"
    assert len(log.samples) == 2
    for sample in log.samples:
        about = sample.metadata["steerlens"]
        signals = about["signals"]
        assert about["strength"] == 1.0
        assert all(name.startswith("blocks.2.hook_steer_") for name in signals)
        # the prompt but for its last token is not steered
        values = next(iter(signals.values()))
        assert values[0] in (None, 0.0)
        assert values[-1] not in (None, 0.0)


def test_what_a_steered_model_cannot_do_is_refused(model, controller):
    with pytest.raises(ValueError, match="has no chat template"):
        as_inspect_model(tiny("llama", host="bridge"), None)
    with pytest.raises(ExceptionGroup) as caught:
        ask(as_inspect_model(model, controller), "w5", top_p=0.5)
    assert "does not honour top_p=0.5" in str(caught.value.exceptions[0])
