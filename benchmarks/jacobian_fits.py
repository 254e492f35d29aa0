"""Fits from Jacobians against the class difference and `lqr`, at one KL, on held-out pairs.

    python benchmarks/jacobian_fits.py --tasks ocean sentiment --folder runs

Rows, each at the strength or level at which the KL is 0.3 nats per token on dev prompts:

caa, lqr: the defaults.
singular vector: of the Jacobian from one layer to a later one, without texts of a class; added at the first. Of the
    top ones, with both signs, the one with the largest effect on dev pairs is taken.
difference in their span: the class difference at that layer, projected on the top singular vectors.
(F + eps)^-1 difference: at one layer, F the Fisher information of the next token's distribution, pulled back to the
    state there: the direction of the largest class difference for its KL.
lqr, Fisher price: R_t = F_{t+1} + eps, so that a control costs the KL that it causes.
lqr, Fisher cost: Q_t = q F_t and Qf = qf F_T, so that errors count by the KL that they stand for.
    Every F has the trace of the identity; eps is 0.1.

Sources: Ayyub, "Power Steering" (omar.bet, 2026), singular vectors by power iteration; Wang and Zhao, "FishBack"
(arXiv 2605.17231), the pulled-back Fisher metric.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import common  # noqa: F401 (first, as it sets the environment)

import torch  # isort: skip

from budget import MODELS, at_limit, jacobians
from equal import Field, ordinary, read_best
from torch import Tensor

import steerlens as sl
from steerlens.control.riccati import CostToGo
from steerlens.core import Controller, Site
from steerlens.evaluate import Arm, Bench, propensity
from steerlens.evaluate.meter import item_means
from steerlens.fit.shipped import shipped, shipped_texts
from steerlens.hosts import host_of
from steerlens.laws.feedback import Feedback
from steerlens.laws.relative import Relative

#: Added to a metric of trace d.
EPS = 0.1
#: Most likely tokens of a distribution that enter its Fisher information; the rest has next to no probability.
LIKELY = 4096


def output_fisher(model: Any, texts: list[str]) -> Tensor:
    """Mean Fisher information of the next token with respect to the state after the last block, `[d d]`, float64.

    `J' (diag p - p p') J`, J the Jacobian of the logits, over all tokens of the texts but the first. Of a
    TransformerBridge.
    """
    site = Site(host_of(model).n_layers - 1, "resid_post")
    states = ordinary(model, texts, [site])[site]
    weight = model.unembed.weight.detach()  # [vocab d]
    total = torch.zeros(states.shape[1], states.shape[1], dtype=torch.float64)
    for x in states:
        normed = model.ln_final(x[None])[0].detach()
        p, tokens = torch.softmax(weight @ normed, 0).topk(LIKELY)
        jacobian = weight[tokens] @ torch.autograd.functional.jacobian(lambda x: model.ln_final(x[None])[0], x)
        centred = (jacobian - p @ jacobian) * p.sqrt()[:, None]
        total += (centred.T @ centred).double()
    return total / len(states)


def pulled_back(plant: sl.Linearization, fisher: Tensor) -> list[Tensor]:
    """The Fisher information with respect to the state before each block and after the last, each of trace d."""
    found = [fisher]
    for A in reversed(plant.jacobians.double()):
        found.insert(0, A.T @ found[0] @ A)
    return [F * (len(F) / F.trace()) for F in found]


def with_weights(
    controller: Controller, plant: sl.Linearization, Q: list[Any], R: list[Any], final: Tensor
) -> Controller:
    """An `lqr` controller of one direction with the gains of other weights, by the dense solver."""
    cost, gains = CostToGo(final), {}
    for t in reversed(range(len(plant))):
        gains[t] = cost.step(plant.jacobian(t).double(), Q[t], R[t])
    loops = []
    for loop in controller.loops:
        setpoint = loop.law.law.setpoint
        rows = (setpoint.basis.double() @ gains[loop.sense.layer].T).float()
        loops.append(loop.replace(law=Relative(Feedback(setpoint, rows))))
    return Controller(loops, controller.recipe)


def singular(plant: sl.Linearization, source: int, target: int, count: int) -> Tensor:
    """Top right singular vectors of the Jacobian from after one block to after another, `[count d]`."""
    product = torch.eye(plant.jacobians.shape[-1], dtype=torch.float64)
    for t in range(source + 1, target + 1):
        product = plant.jacobian(t).double() @ product
    return torch.linalg.svd(product).Vh[:count].float()


def scaled(model: Any, vectors: Tensor, source: int, target: int, bench: Bench) -> list[Controller]:
    """The vectors as additions whose KL is the limit; what was found is kept in the bench's log."""
    assert bench.log is not None
    norm, found = float(host_norm(model, source)), []
    for number, v in enumerate(vectors):
        whole, key = sl.add(v * norm, layer=source), ["singular vector", source, target, number]
        if key not in bench.log:
            bench.log.put(key, at_limit(bench, whole.__mul__, 0.3, rounds=5)[1])
        found.append(whole * bench.log[key])
    return found


def host_norm(model: Any, layer: int) -> Tensor:
    """Median norm of the state of neutral text after a block."""
    site = Site(layer, "resid_post")
    return ordinary(model, shipped_texts("neutral", split="dev")[:4], [site])[site].norm(dim=1).median()


def best_of(candidates: list[Controller], task: str, field: Field, items: int) -> tuple[str, Controller]:
    """The candidate and sign with the largest effect on dev pairs."""
    meter = propensity(shipped(task, split="dev")[:items])
    found = {}
    for number, candidate in enumerate(candidates):
        for sign in (1, -1):
            name = f"{sign * (number + 1):+d}"
            if ["dev", name] not in field.log:
                values = item_means(meter(field.bench, Arm("candidate", candidate, float(sign))))
                field.log.put(["dev", name], float(values.mean()))
            found[name] = field.log[["dev", name]], candidate * sign
    name = max(found, key=lambda name: found[name][0])
    return name, found[name][1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["ocean", "sentiment"])
    parser.add_argument("--parts", nargs="+", choices=("singular", "fisher"), default=("singular", "fisher"))
    parser.add_argument("--folder", type=Path, default=Path("jacobian_fits"))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--items", type=int, default=16)
    parser.add_argument("--count", type=int, default=6, help="of singular vectors that are tried")
    parser.add_argument("--between", type=int, nargs=2, default=(10, 25), help="blocks after which they begin and end")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    given.folder.mkdir(parents=True, exist_ok=True)
    model = MODELS["smollm2"]()
    plant = jacobians(model, given.folder)
    n, d = len(plant), plant.jacobians.shape[-1]
    source, target = given.between
    if "fisher" in given.parts:
        metrics = pulled_back(plant, output_fisher(model, shipped_texts("neutral", split="dev")[:2]))
        ridge = EPS * torch.eye(d, dtype=torch.float64)
    candidates: list[Controller] = []
    for task in given.tasks:
        pairs = read_best(task, "dev")
        print(f"\n{task}: wanted over unwanted, nats per token", flush=True)
        field = Field(model, task, given.folder, prompts=given.prompts, items=given.items)
        one = sl.caa(model, pairs)
        field.score("caa", one, 1.2, "strength")
        loop = sl.lqr(model, pairs, linearization=plant, progress=False)
        field.score("lqr", loop, 2.0)
        if "fisher" in given.parts:
            middle, v = one.loops[0].act.layer, one.loops[0].law.vector
            least = torch.linalg.solve(metrics[middle + 1] + ridge, v.double()).float()
            least = sl.add(least * (v.norm() / least.norm()), layer=middle)
            field.score("(F + eps)^-1 difference", least, 1.5, "strength")
            flat = CostToGo.scalar(0.1, d, dtype=torch.float64, device=torch.device("cpu")).S
            price = with_weights(loop, plant, [1e-4] * n, [F + ridge for F in metrics[1:]], flat)
            field.score("lqr, Fisher price", price)
            cost = with_weights(loop, plant, [1e-4 * F for F in metrics[:-1]], [1.0] * n, 0.1 * metrics[-1])
            field.score("lqr, Fisher cost", cost)
        if "singular" in given.parts:
            vectors = singular(plant, source, target, given.count)
            candidates = candidates or scaled(model, vectors, source, target, field.bench)
            name, best = best_of(candidates, task, field, 8)
            field.score(f"singular vector {name}", best, 1.0, "strength")
            v = sl.caa(model, pairs, layers=[source]).loops[0].law.vector
            for count in (given.count, 8 * given.count):
                span = singular(plant, source, target, count)
                inside = sl.add(v @ span.T @ span, layer=source)
                field.score(f"difference in the span of {count}", inside, 2.0, "strength")
