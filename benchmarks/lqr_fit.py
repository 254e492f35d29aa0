"""Fitting the gains of A-LQR: seconds and peak memory of each solver beside the procedure of the authors.

The baseline, written anew: for every block the vectorised reverse-mode Jacobian over the whole sequence (`fit.py`), all
of them kept; then the Riccati recursion in float32 with stacks of Q, R and K. The solvers are those of `lqr`, one entry
each in SOLVERS. Each fits the same gains for one text: SmolLM2, and one Llama block of width 2048 with random weights.

    python benchmarks/lqr_fit.py [--lengths 12 24] [--width 2048] [--solvers dense]

Seconds: the baseline runs once, in full; each solver before and after it, the mean of both counts. All have run once
before: the first fit of a process takes a second more, for weights that nobody has read yet.

Memory is what torch allocates between entry and return beyond what was there, largest at any time, by its profiler: the
weights are not in it, whatever is kept to the end is. Unit: d^2 floats of 4 bytes. In the baseline's memory run copies
of the first block's Jacobian stand in for those of all blocks but the first and the last, which take the same memory.
`output` and `scalar` are watched by operation: the run stops if one of them makes a d x d tensor.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import common
import torch
from fit import TEXT, full_sequence
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import steerlens as sl
from steerlens.fit.reading import contrast_means
from steerlens.hosts import host_of
from steerlens.models import smollm2, tiny
from steerlens.testing import peak

WEIGHTS = {"q": 0.1, "r": 1.0, "qf": 0.1}


class Plant:
    """A model as Hugging Face made it and as a bridge, and one text."""

    def __init__(self, hf: Any, bridge: Any, ids: list[int]):
        self.hf, self.bridge, self.host = hf, bridge, host_of(bridge)
        self.ids = ids
        # the other side of the contrast only has to differ
        self.pairs = sl.Pairs([ids], [ids[:-2]])
        self.layers = range(self.host.n_layers)


def authors(plant: Plant, *, copies: bool = False) -> dict[int, Tensor]:
    """`K_t v_t` by full-sequence Jacobians and a dense Riccati recursion over stacks.

    With copies, most Jacobians are copies of the first: wrong gains, the same allocations.
    """
    ids, T = torch.tensor([plant.ids]), len(plant.layers)
    if copies and T > 2:
        jacobians = full_sequence(plant.hf, ids, range(1))
        jacobians += [jacobians[0].clone() for _ in range(T - 2)]
        jacobians += full_sequence(plant.hf, ids, range(T - 1, T))
    else:
        jacobians = full_sequence(plant.hf, ids, plant.layers)
    A = torch.stack(jacobians)
    T, d, _ = A.shape
    eye = torch.eye(d)
    Q, R = WEIGHTS["q"] * eye.repeat(T, 1, 1), WEIGHTS["r"] * eye.repeat(T, 1, 1)
    S = torch.empty(T + 1, d, d)
    S[T] = WEIGHTS["qf"] * eye
    K = torch.empty(T, d, d)
    for t in range(T - 1, -1, -1):
        K[t] = torch.linalg.solve(S[t + 1] + R[t], S[t + 1] @ A[t])
        S[t] = Q[t] + A[t].T @ S[t + 1] @ A[t] - A[t].T @ S[t + 1] @ K[t]
    sites = [sl.Site(t, "resid_pre") for t in plant.layers]
    positive, negative = contrast_means(plant.host, plant.pairs, sites)
    gains = {}
    for site in sites:
        difference = positive[site] - negative[site]
        gains[site.layer] = K[site.layer] @ difference / difference.norm()
    return gains


def solver(name: str) -> Callable[[Plant], dict[int, Tensor]]:
    """`lqr` with one of its solvers; only the dense one computes the authors' gains."""

    def fit(plant: Plant) -> dict[int, Tensor]:
        options = WEIGHTS | {"solver": name, "linearize_on": [plant.ids], "progress": False}
        return _gains(sl.lqr(plant.bridge, plant.pairs, **options, paper=True))

    return fit


def _gains(controller: sl.Controller) -> dict[int, Tensor]:
    return {loop.act.layer: loop.law.gains[0] for loop in controller.loops}


#: Another solver is one more entry.
SOLVERS: dict[str, Callable[[Plant], dict[int, Tensor]]] = {
    name: solver(name) for name in ("dense", "output", "scalar")
}


def largest_difference(a: dict[int, Tensor], b: dict[int, Tensor]) -> float:
    return max(float((a[t] - b[t]).norm() / b[t].norm()) for t in a)


class NoSquares(TorchDispatchMode):
    """Stops at a new `[d d]` tensor; views of the model's weights are none."""

    def __init__(self, model: Any, d: int):
        super().__init__()
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.d = d

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, Tensor) and value.shape[-2:] == (self.d, self.d):
                assert value.untyped_storage().data_ptr() in self.weights, f"{function} made a {list(value.shape)}"
        return out


def compare(name: str, plant: Plant, solvers: list[str]) -> None:
    d = plant.host.d_model
    gains: dict[str, dict[int, Tensor]] = {}
    times: dict[str, list[float]] = {solver: [] for solver in ("authors", *solvers)}

    def fit(solver: str) -> None:
        call = authors if solver == "authors" else SOLVERS[solver]
        times[solver].append(common.seconds(lambda: gains.update({solver: call(plant)})))

    full_sequence(plant.hf, torch.tensor([plant.ids]), range(1))
    for solver in solvers:
        SOLVERS[solver](plant)
    for solver in (*solvers, "authors", *solvers):
        fit(solver)
    took = {solver: sum(each) / len(each) for solver, each in times.items()}
    held = {"authors": peak(lambda: authors(plant, copies=True))}
    for solver in solvers:
        held[solver] = peak(lambda solver=solver: SOLVERS[solver](plant))
    for solver in took:
        if solver in ("output", "scalar"):
            with NoSquares(plant.bridge, d):
                SOLVERS[solver](plant)
        print(
            f"{name:18} {len(plant.ids):6} {solver:8} {took[solver]:8.2f} {took['authors'] / took[solver]:7.1f} "
            f"{held[solver] / 1e6:9.1f} {held[solver] / (4 * d * d):8.2f} {held['authors'] / held[solver]:7.1f} "
            f"{largest_difference(gains[solver], gains['authors']):10.1e}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", type=int, nargs="+", default=[12, 24])
    parser.add_argument("--width", type=int, default=2048, help="of the synthetic block; 0: none")
    parser.add_argument("--no-smollm2", action="store_true")
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS), choices=list(SOLVERS))
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} thread, CPU seconds; peak memory beside the weights; ratios: authors / solver")
    print(
        f"{'plant':18} {'tokens':>6} {'solver':8} {'seconds':>8} {'ratio':>7} {'MB':>9} {'d^2':>8} {'ratio':>7} "
        f"{'difference':>10}"
    )
    if not arguments.no_smollm2:
        hf, tokenizer = smollm2(host="hf")
        bridge = smollm2()
        tokens = tokenizer(TEXT)["input_ids"]
        for length in arguments.lengths:
            compare("SmolLM2-135M", Plant(hf, bridge, tokens[:length]), arguments.solvers)
    if arguments.width:
        size = {"n_layers": 1, "d_model": arguments.width}
        hf, _ = tiny("llama", host="hf", **size)
        bridge = tiny("llama", **size)
        ids = list(range(1, arguments.lengths[0] + 1))
        compare(f"1 block, d = {arguments.width}", Plant(hf, bridge, ids), arguments.solvers)


if __name__ == "__main__":
    main()
