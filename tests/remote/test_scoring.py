"""Scores on a real NDIF server are the log-probabilities of the generation there; what it cannot tell is refused."""

from __future__ import annotations

import pytest
import torch
from nnsight.intervention.backends.remote import RemoteError

import steerlens as sl
from steerlens.testing import discover_methods, exceptions

pytestmark = pytest.mark.remote

PROMPTS = [[3, 17, 25, 29, 41, 22, 9], [9, 12, 31, 44]]
LENGTHS = [7, 4]
METHODS = [name for name in discover_methods() if "check_runs_on_a_server" not in exceptions(name)]
OPTIONS = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
OPTIONS |= {"output_logits": True, "return_dict_in_generate": True}


def produced(out, prompt):
    """A greedy continuation, and the log-probability of each of its tokens while it was generated."""
    text = out.sequences[0].tolist()
    steps = [step[0].float().log_softmax(-1) for step in out.logits]
    return text, torch.stack([step[token] for step, token in zip(steps, text[len(prompt) :], strict=True)])


def batch(rows, side):
    """Token ids and mask of some rows, and where each begins."""
    longest = max(map(len, rows))
    ids, starts = torch.full((len(rows), longest), 97), []
    mask = torch.zeros_like(ids)
    for row, text in enumerate(rows):
        start = longest - len(text) if side == "left" else 0
        ids[row, start : start + len(text)], mask[row, start : start + len(text)] = torch.tensor(text), 1
        starts.append(start)
    return {"input_ids": ids, "attention_mask": mask}, starts


def scores(logits, rows, starts):
    """Log-probabilities of the tokens after each prompt."""
    logits = logits.float().log_softmax(-1)
    found = []
    for row, (text, prompt) in enumerate(zip(rows, PROMPTS, strict=True)):
        places = range(len(prompt), len(text))
        found.append(torch.stack([logits[row, starts[row] + t - 1, text[t]] for t in places]))
    return found


def same(found, made):
    """Whether scores are those of the generations."""
    for got, (_, wanted) in zip(found, made, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_scored_equals_generated(method, client, local):
    made = []
    with sl.steer(client, local(method).controller, record=None) as run:
        for prompt in PROMPTS:
            with client.generate(torch.tensor([prompt]), **OPTIONS, remote=True) as tracer:
                out = tracer.result.save()
            made.append(produced(out, prompt))
        rows = [text for text, _ in made]
        for side in ("left", "right"):
            inputs, starts = batch(rows, side)
            with run.scoring(LENGTHS):
                with client.trace(inputs, remote=True):
                    logits = client.output.logits.save()
            same(scores(logits, rows, starts), made)


def test_scored_equals_generated_in_a_block(client, local):
    controller, made = local("lqr").controller, []
    for prompt in PROMPTS:
        with client.generate(torch.tensor([prompt]), **OPTIONS, remote=True) as tracer:
            sl.apply(client, controller)
            out = tracer.result.save()
        made.append(produced(out, prompt))
    rows = [text for text, _ in made]
    for side in ("left", "right"):
        inputs, starts = batch(rows, side)
        with client.trace(inputs, remote=True):
            sl.apply(client, controller, prompt_lengths=LENGTHS)
            logits = client.output.logits.save()
        same(scores(logits, rows, starts), made)


@pytest.mark.parametrize("option", [{"prefill_chunk_size": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_apply_refuses_passes_of_several_tokens_after_the_first(option, client, local):
    controller = local("caa").controller
    with pytest.raises(RemoteError, match="cannot be steered on a server, where caches are not seen"):
        with client.generate(torch.tensor([[3, 17, 25, 29, 3, 17, 25]]), max_new_tokens=4, **option, remote=True):
            sl.apply(client, controller)
