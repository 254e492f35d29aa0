"""Every method: seconds to fit, what it adds to decoding a token, and ODESteer beside the paper's procedure.

Fits on 32 pairs and decodes greedily on SmolLM2 (TransformerBridge), each method with its defaults and nothing
recorded.
A round decodes once unsteered and once with each method, in turning order; cost is the median over rounds of the
ratio to the unsteered decoding of the same round. Methods are discovered.

    python benchmarks/methods.py [--methods caa sadi] [--rounds 6] [--write]

--write keeps the numbers for the table of methods, in steerlens/data/overhead.json. Rows of methods that are not named
stay as they were, and a note says so; ODESteer's procedures are compared if it is among those named.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
from pathlib import Path

import common
import torch

import steerlens as sl
from steerlens.cli.catalogue import MEASURED
from steerlens.core import Now, map_tensors
from steerlens.flow.barriers import exact_barrier, truncate
from steerlens.flow.fields import Quadratic
from steerlens.flow.flows import Flow
from steerlens.flow.sketch import TensorSketch
from steerlens.models import smollm2
from steerlens.testing import Case, discover_methods

PAIRS = 32
#: Steered decoding is to stay within this many percent of unsteered for these.
BAR = {"caa": 3.0, "sadi": 3.0, "cold_kernel": 3.0}
#: The paper's procedure of ODESteer is to take at least this many times the default's milliseconds.
RATIO = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(discover_methods()))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", action="store_true", help="keep the numbers for the table of methods")
    arguments = parser.parse_args()
    rows = decoding(arguments)
    ratios = odesteer_against_the_paper(arguments.device) if "odesteer" in arguments.methods else {}
    if arguments.write:
        keep(rows, ratios, arguments)


def keep(rows: dict[str, dict[str, float]], ratios: dict[str, float], arguments: argparse.Namespace) -> None:
    """Write a run of all methods, or put those of some into the last one."""
    path = Path(sl.__file__).parent / "data" / MEASURED
    today = datetime.date.today().isoformat()
    if set(rows) == set(discover_methods()):
        run = {
            "model": "SmolLM2-135M",
            "machine": machine(arguments.device),
            "date": today,
            "pairs": PAIRS,
            "tokens": arguments.tokens,
            "rounds": arguments.rounds,
            "odesteer_paper_over_default": ratios,
            "methods": rows,
        }
    else:
        run = json.loads(path.read_text(encoding="utf-8"))
        names = ", ".join(f"`{name}`" for name in rows)
        later = f"{names} in a run of {arguments.tokens} tokens and {arguments.rounds} rounds on {today}"
        run["note"] = "; ".join([*([run["note"]] if "note" in run else []), later])
        run["methods"] = dict(sorted((run["methods"] | rows).items()))
        run["odesteer_paper_over_default"] |= ratios
    path.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


def decoding(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Prints a row a method, and returns seconds to fit, cost in percent and its spread."""
    device = arguments.device
    model = smollm2(device=device)
    case = Case("caa", "bridge", device=device, model=model)
    prompt = torch.tensor([[57, 3514, 288, 260, 725, 15238, 1596, 3163, 284]])
    pairs = sl.shipped("sentiment", read="completion")[:PAIRS]
    controllers, fits = {}, {}
    case.generate(prompt, 2)
    for name in arguments.methods:
        fitted: list[sl.Controller] = []

        def fit(name=name, fitted=fitted):
            fitted.append(Case(name, "bridge", device=device, model=model).fit(pairs))

        fits[name] = common.seconds(fit, device)
        controllers[name] = fitted[0]

    def decode(controller=None):
        def call():
            if controller is None:
                return case.generate(prompt, arguments.tokens)
            with sl.steer(model, controller, record=None):
                return case.generate(prompt, arguments.tokens)

        return call

    calls = {"unsteered": decode()} | {name: decode(controller) for name, controller in controllers.items()}
    times = common.paired(calls, arguments.rounds, device)
    unit = "wall" if device.startswith("cuda") else "CPU"
    speed = arguments.tokens / min(times["unsteered"])
    print(f"SmolLM2-135M, {machine(device)}: {PAIRS} pairs, {arguments.tokens} tokens after 9, {unit} time")
    print(f"unsteered {speed:.1f} tokens/s\n{'method':12} {'fit s':>7} {'cost':>7} {'quartiles':>15}")
    rows = {}
    for name in controllers:
        ratios = [a / b for a, b in zip(times[name], times["unsteered"], strict=True)]
        low, middle, high = (100 * (value - 1) for value in statistics.quantiles(ratios, n=4))
        bar = BAR.get(name)
        verdict = "" if bar is None else f"  bar {bar:.0f} %: {'met' if middle <= bar else 'MISSED'}"
        print(f"{name:12} {fits[name]:7.2f} {middle:+6.1f}% {low:+6.1f}% {high:+6.1f}%{verdict}")
        rows[name] = {
            "fit_s": round(fits[name], 2),
            "overhead_percent": round(middle, 1),
            "quartiles_percent": [round(low, 1), round(high, 1)],
        }
    return rows


def odesteer_against_the_paper(device: str, d: int = 4096, n: int = 64) -> dict[str, float]:
    """Prints milliseconds of one call at width d, and returns the ratios of the paper's procedure to the default.

    The paper's procedure stands here twice: with Fourier transforms, as the authors run it, in as few operations as
    possible; and as `mode="paper"` runs it, through the quadratic form of the sketch in all d coordinates.
    """
    generator = torch.Generator().manual_seed(0)
    shift = torch.randn(d, generator=generator) / d**0.5
    positive, negative = (torch.randn(n, d, generator=generator) + sign * shift for sign in (3, -3))
    sketch = TensorSketch.draw(d, components=8000, gamma=0.1, coef0=1.0, seed=0)
    weights = sketch.features(torch.nn.functional.normalize(positive).double()).mean(0).float().to(device)
    transforms = PaperField(sketch, weights, device)
    exact = truncate(exact_barrier(positive, negative), 8)
    # the time of a form does not depend on its values, and an eigendecomposition at this width takes minutes
    whole = Quadratic(*(torch.randn(*shape, generator=generator) for shape in ((d, d), (d,), (d,), (1,))))
    laws = {
        "default": Flow(exact, 0.3),
        "great circle": Flow(truncate(exact, 0), 0.3, solver="circle"),
        "mode='paper'": Flow(whole, 20.0, steps=10, solver="euler", radians=False),
    }
    laws = {name: map_tensors(law, lambda t: t.to(device, torch.float32)) for name, law in laws.items()}
    repeats = {"default": 50, "great circle": 50, "mode='paper'": 2, "transforms": 2}
    ratios = {}
    for tokens in (1, 10):
        x = torch.randn(1, tokens, d, generator=generator).to(device)

        def call(name, x=x):
            for _ in range(repeats[name]):
                if name == "transforms":
                    transforms.steer(x[0], 20.0)
                else:
                    laws[name].act(x, Now())  # as when nothing is recorded

        with torch.no_grad():
            calls = {name: (lambda name=name, call=call: call(name)) for name in repeats}
            for warm in calls.values():
                warm()
            times = common.paired(calls, rounds=7, device=device)
        ms = {name: [1000 * value / repeats[name] for value in times[name]] for name in times}
        line = ", ".join(f"{name} {statistics.median(values):.2f}" for name, values in ms.items())
        print(f"odesteer, d = {d}, {tokens} tokens, ms a call: {line}")
        for name in ("transforms", "mode='paper'"):
            ratio = ratios[f"{name}, {tokens}"] = round(common.ratio(ms[name], ms["default"]), 1)
            print(f"  {name} / default: {ratio:.0f}, bar {RATIO}: {'met' if ratio >= RATIO else 'MISSED'}")
    return ratios


class PaperField:
    """The procedure of ODESteer's authors, written anew: the gradient by the sketch's transforms, ten Euler steps."""

    def __init__(self, sketch: TensorSketch, weights: torch.Tensor, device: str):
        self.buckets = sketch.buckets.to(device)
        self.signs = sketch.signs.float().to(device)
        self.n, self.gamma, self.coef0 = sketch.components, sketch.gamma, sketch.coef0
        self.spectrum = torch.fft.rfft(weights)

    def gradient(self, x: torch.Tensor) -> torch.Tensor:
        r = x.norm(dim=1, keepdim=True) + 1e-12
        u = x / r
        z = torch.cat([self.gamma**0.5 * u, u.new_full((len(u), 1), self.coef0**0.5)], dim=1)
        counts = [
            z.new_zeros(len(z), self.n).index_add_(1, h, z * s) for h, s in zip(self.buckets, self.signs, strict=True)
        ]
        first, second = (torch.fft.rfft(count) for count in counts)
        slope = torch.zeros_like(u)
        for h, s, other in ((self.buckets[0], self.signs[0], second), (self.buckets[1], self.signs[1], first)):
            pulled = torch.fft.irfft(other.conj() * self.spectrum, self.n)
            slope = slope + (s * pulled[:, h])[:, :-1]
        slope = self.gamma**0.5 * slope
        return (slope - (slope * u).sum(1, keepdim=True) * u) / r

    def steer(self, x: torch.Tensor, T: float, steps: int = 10) -> torch.Tensor:
        for _ in range(steps):
            g = self.gradient(x)
            x = x + T / steps * g / (g.norm(dim=1, keepdim=True) + 1e-10)
        return x


def machine(device: str) -> str:
    """The kind of machine, in words that name no place."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread)"


if __name__ == "__main__":
    main()
