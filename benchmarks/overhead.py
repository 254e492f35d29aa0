"""Tokens per second of greedy decoding on SmolLM2, steered against unsteered, on each host.

python benchmarks/overhead.py [--hosts bridge nnsight] [--tokens 24] [--rounds 10]
"""

from __future__ import annotations

import argparse

import common
import torch

import steerlens as sl
from steerlens.models import smollm2
from steerlens.testing import Case, discover_hosts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hosts", nargs="+", default=discover_hosts())
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    unit = "wall" if arguments.device.startswith("cuda") else "CPU"
    print(f"SmolLM2-135M, batch 1, {arguments.tokens} tokens after 9, {torch.get_num_threads()} thread, {unit} time")
    print(f"{'host':8} {'controller':28} {'tokens/s':>8} {'cost':>7}")
    for host in arguments.hosts:
        measure(host, arguments)


def measure(host: str, arguments: argparse.Namespace) -> None:
    model = smollm2(host=host, device=arguments.device)
    case = Case("lqr", host, device=arguments.device, model=model)
    pairs = sl.shipped("sentiment")[:4]
    prompt = torch.tensor([[57, 3514, 288, 260, 725, 15238, 1596, 3163, 284]])
    caa, lqr = sl.caa(model, pairs), sl.lqr(model, pairs, linearize_on=1, progress=False)

    def decode(controller=None, record=None):
        def call():
            # HookedTransformer decodes several times slower than the others
            count = arguments.tokens // (3 if host == "hooked" else 1)
            if controller is None:
                return case.generate(prompt, count)
            with sl.steer(model, controller, record=record):
                return case.generate(prompt, count)

        return call

    calls = {
        "unsteered": decode(),
        "caa, one layer": decode(caa),
        "lqr, 29 layers": decode(lqr),
        "lqr, recording scalars": decode(lqr, "scalars"),
        "lqr, recording everything": decode(lqr, "all"),
    }
    decode()()
    times = common.paired(calls, arguments.rounds, arguments.device)
    count = arguments.tokens // (3 if host == "hooked" else 1)
    for name in calls:
        cost = 100 * (common.ratio(times[name], times["unsteered"]) - 1)
        print(f"{host:8} {name:28} {count / min(times[name]):8.1f} {cost:+6.1f}%")


if __name__ == "__main__":
    main()
