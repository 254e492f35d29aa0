"""Tokens per second of greedy decoding on SmolLM2, steered against unsteered, for each law on each host.

Every method with its defaults, and the control suite once more in its other forms. Unsteered and steered decoding
alternate, and each steered one is compared with the two unsteered ones beside it; cost is the median over the rounds,
with the quartiles beside it. Attaching is not timed.
"lqr" is the paper's, `lqr(..., paper=True)`; "lqr, own origin" is the default, with its second pass beside the first.
"visited only" is `lqr * 0`: the host's own cost of going to 29 sensors and 29 actuators, with nothing computed there.
"floor: an edit by hand" is nnsight's own cost of the same reads and writes, without steerlens: every block's output is
read and written back unchanged.

    python benchmarks/overhead.py [--hosts bridge nnsight] [--tokens 24] [--rounds 10] [--controllers lqr]

With --counts, exact numbers instead of times: torch operations and Python calls per generated token, steered minus
unsteered, on a tiny model of 4 layers, for every method with nothing recorded and with scalars recorded.

    python benchmarks/overhead.py --counts [--hosts bridge] [--controllers lqr]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import common
import torch

import steerlens as sl
from steerlens.models import smollm2
from steerlens.testing import Case, counts_of_steering, discover_hosts, discover_methods, exceptions

#: A rank-one controller at all layers is to cost at most this many percent.
BAR = {"lqr": 4.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", nargs="+", default=discover_hosts())
    parser.add_argument("--tokens", type=int, default=24, help="a third of them on HookedTransformer")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--controllers", nargs="+", help="names, or first letters of names; default all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--counts", action="store_true", help="count operations and calls instead of taking times")
    arguments = parser.parse_args()
    if arguments.counts:
        count(arguments)
        return
    unit = "wall" if arguments.device.startswith("cuda") else "CPU"
    print(f"SmolLM2-135M, batch 1, {arguments.tokens} tokens after 9, {torch.get_num_threads()} thread, {unit} time")
    print(f"{'host':8} {'controller':26} {'loops':>5} {'tokens/s':>8} {'cost':>7} {'quartiles':>15}")
    for host in arguments.hosts:
        measure(host, arguments)


def count(arguments: argparse.Namespace) -> None:
    """Prints counts per token of every method on every host."""
    print("a tiny model of 4 layers, per generated token, steered minus unsteered")
    print(f"{'host':8} {'method':14} {'loops':>5} {'record':>8} {'torch operations':>17} {'Python calls':>13}")
    for host in arguments.hosts:
        for method in arguments.controllers or discover_methods():
            if host in exceptions(method):
                continue
            case = Case(method, host)
            for record in (None, "scalars"):
                operations, calls = counts_of_steering(case, record=record)
                shown = f"{record!s:>8} {operations:>17.2f} {calls:>13.2f}"
                print(f"{host:8} {method:14} {len(case.controller.loops):>5} {shown}", flush=True)


def controllers(case: Case) -> dict[str, Any]:
    """By name, a function that fits a controller, and what is recorded."""
    shipped = sl.shipped("sentiment")[:4]

    @cache
    def lqr(**options: Any) -> sl.Controller:
        return sl.lqr(case.model, shipped, linearize_on=1, progress=False, **options)

    def other(method: str) -> sl.Controller:
        return Case(method, case.host, model=case.model).fit(shipped)

    found = {
        "visited only": (lambda: lqr(paper=True) * 0, None),
        "lqr": (lambda: lqr(paper=True), None),
        "lqr, own origin": (lqr, None),
        "lqr, recording scalars": (lambda: lqr(paper=True), "scalars"),
        "lqr, recording everything": (lambda: lqr(paper=True), "all"),
        "lqr, output": (lambda: lqr(solver="output", paper=True), None),
        "lqr, output, preview": (lambda: lqr(solver="output", preview=True, paper=True), None),
        "lqr, scalar": (lambda: lqr(solver="scalar", paper=True), None),
    }
    for method in discover_methods():
        if method != "lqr" and case.host not in exceptions(method):
            found[method] = partial(other, method), None
    if case.host == "nnsight":
        found["floor: an edit by hand"] = "by hand", None
    return found


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
    """A context in which the model runs with an entry of `controllers`; for None unsteered."""
    if entry is None:
        return nullcontext()
    controller, record = entry
    return by_hand(model) if controller == "by hand" else sl.steer(model, controller, record=record)


def measure(host: str, arguments: argparse.Namespace) -> None:
    """Prints the rows of a host."""
    model = smollm2(host=host, device=arguments.device)
    case = Case("lqr", host, device=arguments.device, model=model)
    prompt = torch.tensor([[57, 3514, 288, 260, 725, 15238, 1596, 3163, 284]])
    # HookedTransformer decodes several times slower than the others
    count = arguments.tokens // (3 if host == "hooked" else 1)
    wanted = controllers(case)
    if arguments.controllers:
        begins = tuple(name for name in arguments.controllers if name not in wanted)
        wanted = {
            name: entry for name, entry in wanted.items() if name in arguments.controllers or name.startswith(begins)
        }
    attached = {name: (fit() if callable(fit) else fit, record) for name, (fit, record) in wanted.items()}
    case.generate(prompt, count)
    plain, costs = [], {name: [] for name in attached}
    best = dict.fromkeys(attached, float("inf"))

    def decode(entry: Any) -> float:
        with attach(model, entry):
            return common.seconds(lambda: case.generate(prompt, count), arguments.device)

    for _ in range(arguments.rounds):
        plain.append(decode(None))
        for name, entry in attached.items():
            steered = decode(entry)
            plain.append(decode(None))
            costs[name].append(100 * (2 * steered / (plain[-2] + plain[-1]) - 1))
            best[name] = min(best[name], steered)
    print(f"{host:8} {'unsteered':26} {'':5} {count / min(plain):8.1f}", flush=True)
    for name, entry in attached.items():
        low, middle, high = statistics.quantiles(costs[name], n=4)
        loops = "" if entry[0] == "by hand" else len(entry[0].loops)
        verdict = f"  bar {BAR[name]:.0f} %: {'met' if middle <= BAR[name] else 'MISSED'}" if name in BAR else ""
        speed, spread = f"{count / best[name]:8.1f}", f"{middle:+6.1f}% {low:+6.1f}% {high:+6.1f}%"
        print(f"{host:8} {name:26} {loops:>5} {speed} {spread}{verdict}", flush=True)


if __name__ == "__main__":
    main()
