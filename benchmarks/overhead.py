"""Tokens per second of greedy decoding on SmolLM2, steered against unsteered, for each law on each host.

Each round decodes once with every controller, in turning order, and compares within the round; attaching is not timed.
"visited only" is `lqr * 0`: the host's own cost of going to 29 sensors and 29 actuators, with nothing computed there.
"floor: an edit by hand" is nnsight's own cost of the same reads and writes, without steerlens: every block's output is
read and written back unchanged.

    python benchmarks/overhead.py [--hosts bridge nnsight] [--tokens 24] [--rounds 10] [--controllers lqr]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

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
    parser.add_argument("--controllers", nargs="+", help="first letters of those to measure; default all")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    unit = "wall" if arguments.device.startswith("cuda") else "CPU"
    print(f"SmolLM2-135M, batch 1, {arguments.tokens} tokens after 9, {torch.get_num_threads()} thread, {unit} time")
    print(f"{'host':8} {'controller':28} {'tokens/s':>8} {'cost':>7}")
    for host in arguments.hosts:
        measure(host, arguments)


def controllers(model: Any) -> dict[str, tuple[sl.Controller, Any]]:
    """By name, a controller and what is recorded."""
    pairs = sl.shipped("sentiment")[:4]
    lqr = sl.lqr(model, pairs, linearize_on=1, progress=False)
    output = sl.lqr(model, pairs, solver="output", preview=True, linearize_on=1, progress=False)
    return {
        "caa, one layer": (sl.caa(model, pairs), None),
        "visited only": (lqr * 0, None),
        "lqr, 29 layers": (lqr, None),
        "lqr, recording scalars": (lqr, "scalars"),
        "lqr, recording everything": (lqr, "all"),
        "lqr, preview": (output, None),
        "pid, 29 layers": (sl.pid(model, pairs), None),
        "ablation, 30 layers": (sl.ablation(model, pairs), None),
    }


@contextmanager
def by_hand(model: Any) -> Iterator[None]:
    """An nnsight edit that reads the first block's input and reads and rewrites the outputs of the 29 blocks."""
    layers = list(model.model.layers)[:29]
    norm, before = layers[0].input_layernorm, list(model._edits)
    with model.edit(inplace=True) as tracer:
        for _ in tracer.iter[:]:
            norm.input  # noqa: B018 (a read)
            for layer in layers:
                layer.output = layer.output
    try:
        yield
    finally:
        model._edits = before


def attach(model: Any, entry: Any) -> Any:
    """A context in which the model runs with an entry of `controllers`, unsteered for None."""
    if entry is None:
        return nullcontext()
    return by_hand(model) if entry == "by hand" else sl.steer(model, entry[0], record=entry[1])


def measure(host: str, arguments: argparse.Namespace) -> None:
    model = smollm2(host=host, device=arguments.device)
    case = Case("lqr", host, device=arguments.device, model=model)
    prompt = torch.tensor([[57, 3514, 288, 260, 725, 15238, 1596, 3163, 284]])
    # HookedTransformer decodes several times slower than the others
    count = arguments.tokens // (3 if host == "hooked" else 1)
    attached = {"unsteered": None, **controllers(model)}
    if host == "nnsight":
        attached["floor: an edit by hand"] = "by hand"
    if arguments.controllers:
        attached = {
            name: entry for name, entry in attached.items() if name.startswith(("unst", *arguments.controllers))
        }
    names, times = list(attached), {name: [] for name in attached}
    case.generate(prompt, count)
    for turn in range(arguments.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            with attach(model, attached[name]):
                times[name].append(common.seconds(lambda: case.generate(prompt, count), arguments.device))
    for name in names:
        cost = 100 * (common.ratio(times[name], times["unsteered"]) - 1)
        print(f"{host:8} {name:28} {count / min(times[name]):8.1f} {cost:+6.1f}%", flush=True)


if __name__ == "__main__":
    main()
