"""Block Jacobians for one text: one token against its KV cache, beside reverse mode over the whole sequence.

The baseline is the procedure of the A-LQR authors, written anew: for each block the vectorised reverse-mode Jacobian of
the last position's output with respect to all positions, of which the last position's slice is kept.

    python benchmarks/fit.py [--layers 30] [--lengths 12 24]
"""

from __future__ import annotations

import argparse

import common
import torch

import steerlens as sl
from steerlens.hosts import host_of
from steerlens.models import smollm2

TEXT = (
    "The hotel was spotless and the staff were so kind that we stayed another week, walked along the beach every "
    "morning, and came home with sand in our shoes and a promise to return."
)


def full_sequence(model: torch.nn.Module, ids: torch.Tensor, layers: range) -> list[torch.Tensor]:
    """The baseline on a Hugging Face model."""
    calls = []
    handles = [
        layer.register_forward_pre_hook(lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    jacobians = []
    for t in layers:
        args, kwargs = calls[t]

        def last(x, t=t, kwargs=kwargs):
            out = model.model.layers[t](x, **kwargs)
            return (out if isinstance(out, torch.Tensor) else out[0])[0, -1]

        jacobian = torch.autograd.functional.jacobian(last, args[0].detach(), vectorize=True)
        jacobians.append(jacobian[:, 0, -1])
    return jacobians


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=30, help="how many blocks to time, spread over the depth")
    parser.add_argument("--lengths", type=int, nargs="+", default=[12, 24])
    arguments = parser.parse_args()
    model, tokenizer = smollm2(host="hf")
    bridge = smollm2()
    host = host_of(bridge)
    layers = range(0, 30, max(1, 30 // arguments.layers))
    tokens = tokenizer(TEXT)["input_ids"]
    print(f"SmolLM2-135M, {len(layers)} of 30 blocks, {torch.get_num_threads()} thread, CPU seconds")
    print(f"{'tokens':>6} {'baseline':>9} {'steerlens':>9} {'ratio':>6} {'largest difference':>19}")
    for length in arguments.lengths:
        ids = torch.tensor([tokens[:length]])
        kept: dict[str, list[torch.Tensor]] = {}

        def ours(ids=ids, kept=kept):
            nominal = host.nominal(ids[0].tolist())
            kept["ours"] = [nominal.jacobian(t) for t in layers]

        def theirs(ids=ids, kept=kept):
            kept["theirs"] = full_sequence(model, ids, layers)

        times = common.paired({"theirs": theirs, "ours": ours}, rounds=2)
        difference = max(float((a - b).norm() / b.norm()) for a, b in zip(kept["ours"], kept["theirs"], strict=True))
        baseline, mine = min(times["theirs"]), min(times["ours"])
        print(f"{length:6} {baseline:9.2f} {mine:9.2f} {baseline / mine:6.1f} {difference:19.1e}")
    pairs = sl.shipped("sentiment")[:8]
    fit = min(
        common.paired({"fit": lambda: sl.lqr(bridge, pairs, linearize_on=1, progress=False, paper=True)}, 2)["fit"]
    )
    plant = sl.linearize(bridge, pairs.positive[:1], progress=False)
    again = min(common.paired({"fit": lambda: sl.lqr(bridge, pairs, linearization=plant, paper=True)}, 2)["fit"])
    print(f"whole fit, 8 pairs, one text linearised: {fit:.1f} s; with the linearization at hand: {again:.1f} s")


if __name__ == "__main__":
    main()
