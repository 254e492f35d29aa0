"""Scored equals generated on a real model, left and right padding, float32.

Each method on one of the hosts, in turn; `STEERLENS_EVERY=1` runs each on all, in some five minutes.
"""

from __future__ import annotations

import os
from functools import cache

import pytest
import torch

import steerlens as sl
from steerlens.models import smollm2
from steerlens.testing import Case, discover_hosts, discover_methods, exceptions, padding

pytestmark = pytest.mark.real_model

HOSTS = discover_hosts()
METHODS = sorted(discover_methods())
PAIRS = [
    (host, method)
    for index, method in enumerate(METHODS)
    for host in HOSTS
    if os.environ.get("STEERLENS_EVERY") == "1" or host == HOSTS[index % len(HOSTS)]
]
PROMPTS, COUNT = ["The best thing about the sea is", "My dog"], 3
#: Fewer passes than a fit needs that is to be any good: where controls act is what is tested here.
QUICK = {"lqr": {"solver": "scalar"}}
#: Of the largest logit. `tda` switches a neuron off or not: rounding takes one of 46,080 across its threshold, which
#: moves log-probabilities by .009 (nnsight, one neuron of block 7).
ROUNDING = {"tda": 5e-4}


@cache
def model(host):
    return smollm2(host=host)


@cache
def fitted(method):
    """On one host for all, since they share the weights."""
    return Case(method, HOSTS[0], model=model(HOSTS[0])).fit(**QUICK.get(method, {}))


def produced(case, prompt):
    """A greedy continuation, and the log-probability of each of its tokens while it was generated."""
    ids = torch.tensor([prompt])
    if case.host == "nnsight":
        options = {"max_new_tokens": COUNT, "min_new_tokens": COUNT, "do_sample": False}
        with case.model.generate(ids, **options, output_logits=True, return_dict_in_generate=True) as tracer:
            out = tracer.result.save()
        text, steps = out.sequences[0].tolist(), [step[0] for step in out.logits]
    else:
        steps = []
        handle = case.model.unembed.register_forward_hook(lambda *call: steps.append(call[-1][0, -1].clone()))
        try:
            text = case.generate(ids, COUNT)[0].tolist()
        finally:
            handle.remove()
    pairs = zip(steps, text[len(prompt) :], strict=True)
    return text, torch.stack([step.log_softmax(-1)[token] for step, token in pairs])


@pytest.mark.parametrize(("host", "method"), PAIRS)
def test_scored_equals_generated(host, method):
    if host in exceptions(method):
        pytest.skip(exceptions(method)[host])
    case = Case(method, host, model=model(host))
    tokenizer, made, moved = case.model.tokenizer, [], 0.0
    with torch.no_grad(), sl.steer(case.model, fitted(method), trust=True, record=None) as run:
        prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
        made = [produced(case, prompt) for prompt in prompts]
        rows, longest = [text for text, _ in made], max(map(len, prompts)) + COUNT
        for side in ("left", "right"):
            ids, starts = torch.full((len(rows), longest), tokenizer.pad_token_id), []
            mask = torch.zeros_like(ids)
            for row, text in enumerate(rows):
                starts.append(longest - len(text) if side == "left" else 0)
                place = slice(starts[row], starts[row] + len(text))
                ids[row, place], mask[row, place] = torch.tensor(text), 1
            with padding(case.model, side), run.scoring([len(prompt) for prompt in prompts]):
                logits = case.logits(ids, mask).log_softmax(-1)
            for row, (text, wanted) in enumerate(made):
                places = range(len(prompts[row]), len(text))
                found = torch.stack([logits[row, starts[row] + t - 1, text[t]] for t in places])
                # rounding goes with the size of the logits, of which these are differences
                scale = float(logits[row, starts[row] + len(text) - 1].abs().max())
                torch.testing.assert_close(found, wanted, rtol=0, atol=ROUNDING.get(method, 1e-5) * scale)
    with torch.no_grad():
        plain = case.logits(ids, mask).log_softmax(-1)
    for row, text in enumerate(rows):
        moved = max(moved, float((plain[row] - logits[row])[mask[row].bool()][len(text) - COUNT - 1 :].abs().max()))
    # what acts on some texts only may find nothing to do on these two
    assert moved > 1e-3 or method in ("ablation", "cast", "inferaligner", "hpr"), f"{method} changes nothing"
