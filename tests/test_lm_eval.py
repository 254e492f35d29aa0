"""lm-evaluation-harness over a steered model: offline, on task files written here."""

from __future__ import annotations

import json
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch

import steerlens as sl
from steerlens.models import tiny

pytest.importorskip("lm_eval", reason="needs lm-eval, which the extra `eval` installs")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from steerlens.evaluate.lm_eval import SteeredLM, cut

CHOICES = [
    ("w1 w2 w3", [" w7 w8", " w9", " w10 w11 w12"]),
    ("w5 w6", [" w20", " w21 w22", " w23"]),
    ("w40 w41 w42 w43 w44", [" w1", " w2 w2", " w3 w4 w5"]),
]


@pytest.fixture(scope="module")
def controller(host, tiny_model):
    pairs = sl.Pairs(["w1 w2 w3", "w9 w8"], ["w4 w5 w6", "w30 w31"])
    return sl.caa(tiny_model(host), pairs, layers=[1, 2])


@pytest.fixture
def tasks(tmp_path):
    """A multiple-choice task, a generation task and a perplexity task, as files."""
    items = [{"question": question, "answers": answers, "gold": 0} for question, answers in CHOICES]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)) + "\n")
    common = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/items.jsonl\n"
        "test_split: test\nmetadata:\n  version: 1\n"
    )
    files = {
        "choice": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: answers\n"
        "doc_to_target: gold\ntarget_delimiter: ''\nmetric_list:\n  - metric: acc\n",
        "writing": "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answers[0]}}'\n"
        "generation_kwargs:\n  until: ['w13']\n  max_gen_toks: 6\n  do_sample: false\n"
        "metric_list:\n  - metric: exact_match\n",
        "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{question}}'\n"
        "metric_list:\n  - metric: word_perplexity\n",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n" + common + text)
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def run(model, name, tasks):
    return lm_eval.simple_evaluate(
        model=model, tasks=[name], task_manager=tasks, log_samples=True, bootstrap_iters=0, verbosity="ERROR"
    )


def asked(kind: str, *arguments) -> list[Instance]:
    return [Instance(kind, {}, given, 0) for given in arguments]


def alone(model, controller, prompt: list[int], completion: list[int]) -> tuple[float, bool]:
    """Log probability of a completion, one token and one forward pass at a time, without a cache.

    Position 0 is left alone, as `where="last"` does.
    """
    total, greedy = 0.0, True
    for count in range(len(completion)):
        ids = torch.tensor([prompt + completion[:count]])
        with torch.no_grad():
            logits = sl.hosts.host_of(model).logits(ids) if controller is None else None
            if controller is not None:
                with sl.steer(model, controller, where=slice(max(len(prompt) - 1, 1), None), record=None):
                    logits = sl.hosts.host_of(model).logits(ids)
        total += float(logits[0, -1].log_softmax(-1)[completion[count]])
        greedy &= int(logits[0, -1].argmax()) == completion[count]
    return total, greedy


def words(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def test_a_local_task_gives_what_the_steered_model_says_token_by_token(host, tiny_model, controller, tasks):
    model = tiny_model(host)
    for steering in (None, controller):
        found = run(SteeredLM(model, steering, batch_size=2), "choice", tasks)
        samples = sorted(found["samples"]["choice"], key=lambda sample: sample["doc_id"])
        assert len(samples) == len(CHOICES)
        for (question, answers), sample in zip(CHOICES, samples, strict=True):
            for answer, response in zip(answers, sample["filtered_resps"], strict=True):
                value, greedy = alone(model, steering, words(question), words(answer))
                assert float(response[0]) == pytest.approx(value, abs=2e-5)
                assert str(response[1]) == str(greedy)


def test_the_harness_reproduces_our_own_numbers(host, tiny_model, controller):
    model = tiny_model(host)
    items = [(question, answers[:1], answers[1:]) for question, answers in CHOICES]
    effect = sl.evaluate.mc(items, form="mc2")
    ours = sl.evaluate(model, controller, effect, strengths=(0, 1), baselines=(), damage=(), progress=False)
    table = ours.items
    harness = SteeredLM(model, controller)
    for index, (question, answers) in enumerate(CHOICES):
        requests = asked("loglikelihood", *((question, answer) for answer in answers))
        levels = torch.tensor([value for value, _ in harness.loglikelihood(requests)]).double().exp()
        chosen = table[(table["strength"] == 1) & (table["item"] == index)]
        assert list(chosen["MC2"]) == [pytest.approx(float(levels[0] / levels.sum()), rel=1e-5)]


def test_steering_shows_in_every_kind_of_request(host, tiny_model, controller, tasks):
    model = tiny_model(host)
    plain, steered, off = SteeredLM(model), SteeredLM(model, controller), SteeredLM(model, controller, strength=0.0)
    requests = asked("loglikelihood", ("w1 w2 w3", " w7 w8"))
    rolling = asked("loglikelihood_rolling", ("w1 w2 w3 w4 w5",))
    writing = asked("generate_until", ("w1 w2", {"until": [], "max_gen_toks": 8}))
    assert plain.loglikelihood(requests) == off.loglikelihood(requests) != steered.loglikelihood(requests)
    assert plain.loglikelihood_rolling(rolling) == off.loglikelihood_rolling(rolling)
    assert plain.loglikelihood_rolling(rolling) != steered.loglikelihood_rolling(rolling)
    assert plain.generate_until(writing) == off.generate_until(writing) != steered.generate_until(writing)
    rolled = [run(model, "rolling", tasks)["results"]["rolling"]["word_perplexity,none"] for model in (plain, steered)]
    assert rolled[0] != rolled[1]
    texts = [run(model, "writing", tasks)["samples"]["writing"][0]["filtered_resps"] for model in (plain, steered)]
    assert texts[0] != texts[1]


def test_rolling_sums_the_windows_of_a_long_text(host, tiny_model, controller):
    model = tiny_model(host)
    text = " ".join(f"w{index}" for index in range(10))
    found = SteeredLM(model, controller, max_length=4).loglikelihood_rolling(asked("loglikelihood_rolling", (text,)))
    # windows of four predictions; each is continued from the token before it, which is all of its prompt
    expected = sum(
        alone(model, controller, [start - 1] if start else [98], list(range(start, min(start + 4, 8))))[0]
        for start in (0, 4)
    )
    # the harness gives the last, shorter window as much context as fits
    expected += alone(model, controller, [5, 6, 7], [8, 9])[0]
    assert found == [pytest.approx(expected, abs=5e-5)]


def test_generation_is_the_steered_models_own_and_ends_at_a_stop_string(host, tiny_model):
    model = tiny_model(host)
    controller = sl.caa(model, sl.Pairs(["w1 w2 w3"], ["w4 w5 w6"]), layers=[2])
    prompt = "w5 w6"
    ids = words(prompt)
    with sl.steer(model, controller, record=None):
        tokens = sl.hosts.host_of(model).sample(torch.tensor([ids]), 8, temperature=0.0)[0, len(ids) :].tolist()
    tokens = tokens[: tokens.index(99)] if 99 in tokens else tokens
    written = [f"w{token}" for token in tokens if token < 97]
    assert len(written) >= 2
    lm = SteeredLM(model, controller)
    options = [{"until": stop, "max_gen_toks": 8} for stop in ([], written[1])]
    whole, short = lm.generate_until(asked("generate_until", *((prompt, option) for option in options)))
    assert whole.split() == written
    assert short.split() == cut(" ".join(written), [written[1]]).split()


def test_a_long_prompt_loses_its_beginning(host, tiny_model):
    model = tiny_model(host)
    lm = SteeredLM(model, max_length=5)
    request = asked("loglikelihood", ("w1 w2 w3 w4 w5 w6", " w7 w8"))
    assert lm.loglikelihood(request)[0][0] == pytest.approx(alone(model, None, [3, 4, 5, 6], [7, 8])[0], abs=2e-5)
    with pytest.raises(ValueError, match="leaves no context in 5"):
        lm.loglikelihood(asked("loglikelihood", ("w1", " w2 w3 w4 w5 w6 w7 w8")))


def test_options_that_are_not_honoured_are_refused(host, tiny_model):
    model = tiny_model(host)
    lm = SteeredLM(model)
    with pytest.raises(ValueError, match=r"a task asks for top_p=0\.9; honoured are until, max_gen_toks"):
        lm.generate_until(asked("generate_until", ("w1", {"top_p": 0.9, "do_sample": True, "temperature": 1.0})))
    with pytest.raises(ValueError, match="move the model"):
        SteeredLM(model, device="meta")
    with pytest.raises(ValueError, match="it is one of transformer_lens, nnsight"):
        SteeredLM("smollm2", library="vllm")


def test_the_registered_name_takes_a_controller_file(host, tiny_model, controller, tasks, tmp_path):
    model = tiny_model(host)
    controller.save(tmp_path / "caa.safetensors")
    named = {"model": model, "controller": str(tmp_path / "caa.safetensors"), "strength": 0.5}
    found = lm_eval.simple_evaluate(
        model="steerlens", model_args=named, tasks=["choice"], task_manager=tasks, bootstrap_iters=0, verbosity="ERROR"
    )
    expected = run(SteeredLM(model, controller, strength=0.5), "choice", tasks)
    assert found["results"] == expected["results"]


def test_the_entry_point_is_the_adapter():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    module, name = project["entry-points"]["lm_eval.models"]["steerlens"].split(":")
    assert getattr(import_module(module), name) is SteeredLM


def test_chats_go_through_the_template():
    model = tiny("llama", host="bridge")
    model.tokenizer.chat_template = "{% for m in messages %}w1 {{ m.content }} {% endfor %}w2"
    assert SteeredLM(model).apply_chat_template([{"role": "user", "content": "w7"}]) == "w1 w7 w2"


def test_cut_takes_the_earliest_stop():
    assert cut("a b c d", ["d", "c"]) == "a b "
    assert cut("a b", ["z"]) == "a b"
