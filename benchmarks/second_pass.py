"""What a reference costs: a second pass of the model beside the steered one, against doubled rows in the batch.

python benchmarks/second_pass.py             # torch operations and Python calls per token, on a tiny model
python benchmarks/second_pass.py --seconds   # CPU seconds of a prompt and per token, on SmolLM2

Doubled rows are measured as the plain model on every row twice, which is the least they could cost: both halves go
through all blocks, the final norm and the output matrix. The second pass ends where the last loop senses.
"""

from __future__ import annotations

import argparse

from common import paired, ratio  # first, as it sets the environment

import torch  # isort: skip

import steerlens as sl
from steerlens.fit.shipped import shipped, shipped_texts
from steerlens.models import smollm2
from steerlens.testing import Case, discover_hosts
from steerlens.testing.counts import count_per_token


def counts() -> None:
    """Per generated token: the model alone, on doubled rows, and under a loop with each kind of origin."""
    for name in discover_hosts():
        case = Case("lqr", name)
        ids = torch.tensor([case.prompt])
        found = {
            "plain": count_per_token(lambda tokens: case.generate(ids, tokens)),  # noqa: B023 (called at once)
            "doubled rows": count_per_token(lambda tokens: case.generate(ids.repeat(2, 1), tokens)),  # noqa: B023
        }
        for origin in ("zero", "own"):
            with case.steer(controller=case.fit(origin=origin), record=None):
                found[f"origin={origin}"] = count_per_token(lambda tokens: case.generate(ids, tokens))  # noqa: B023
        for label, value in found.items():
            print(f"{name:8} {label:14} {value.operations:7.0f} operations {value.calls:7.0f} calls per token")


def seconds(rounds: int, tokens: int) -> None:
    """Ratios to the model alone: a long batch in one pass, and the decoding of one row and of eight."""
    model = smollm2()
    pairs = shipped("sentiment", split="dev", read="mean")[:8]
    controllers = {
        origin: sl.lqr(model, pairs, origin=origin, solver="scalar", linearize_on=1, progress=False)
        for origin in ("zero", "own")
    }
    prompts = [model.to_tokens(text, prepend_bos=False) for text in shipped_texts("prompts")[:40]]
    length = min(ids.shape[1] for ids in prompts)
    ids = torch.cat([ids[:, :length] for ids in prompts[:8]])
    text = ids.repeat(1, 64 // length + 1)[:, :64]

    def steered(origin, call):
        def run():
            with sl.steer(model, controllers[origin], record=None):
                call()

        return run

    def decode(rows):
        model.generate(rows, max_new_tokens=tokens, do_sample=False, stop_at_eos=False, verbose=False)

    for what, call, rows in (
        ("a pass over 8 texts of 64 tokens", model, text),
        (f"{tokens} tokens after 1 prompt", decode, ids[:1]),
        (f"{tokens} tokens after 8 prompts", decode, ids),
    ):

        def once(call=call, rows=rows):
            with torch.no_grad():
                call(rows)

        def doubled(call=call, rows=rows):
            with torch.no_grad():
                call(rows.repeat(2, 1))

        calls = {"plain": once, "doubled rows": doubled}
        calls |= {f"origin={origin}": steered(origin, once) for origin in controllers}
        times = paired(calls, rounds)
        for label in calls:
            print(f"{what:34} {label:14} {ratio(times[label], times['plain']):.2f} of the model alone")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.seconds:
        seconds(arguments.rounds, arguments.tokens)
    else:
        counts()
