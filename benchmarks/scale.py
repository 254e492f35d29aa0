"""How long `lqr` takes on a model of a given size: one block of its widths is measured, the whole model computed.

    python benchmarks/scale.py [--models gemma-2-2b llama-3-8b llama-3-70b] [--share 16] [--solvers dense output scalar]

Measured, on this machine in float32: one block with random weights. For `dense` a share of its d gradients (1/16 by
default) and the step of the Riccati recursion, for `output` and `scalar` a gradient and a tangent; peak memory beside
the weights by torch's allocator. Computed: seconds of the whole fit for one text, from these and the number of blocks,
and for a GPU from the number of operations at the rate that is printed; bytes of what a remote fit brings back. Each
figure is labelled. The forward pass over the text is left out: it is that of one prompt.
"""

from __future__ import annotations

import argparse

import common
import torch
from transformers import Gemma2Config, Gemma2Model, LlamaConfig, LlamaModel

from steerlens.control.riccati import CostToGo
from steerlens.hosts.blocks.hf import nominal
from steerlens.testing import peak

#: Layers, width, width of the MLP, query heads, key heads, size of a head.
SIZES = {
    "gemma-2-2b": (26, 2304, 9216, 8, 4, 256),
    "llama-3-8b": (32, 4096, 14336, 32, 8, 128),
    "llama-3-70b": (80, 8192, 28672, 64, 8, 128),
}
#: Half of the float32 peak of the data sheet (67 TFLOP/s) of an NVIDIA H100 SXM.
GPU, GPU_RATE = "H100", 33e12
TOKENS = 12


def block(name: str) -> torch.nn.Module:
    """A base model of one block, random weights."""
    _, d, d_mlp, heads, kv, d_head = SIZES[name]
    kind, model = (Gemma2Config, Gemma2Model) if name.startswith("gemma") else (LlamaConfig, LlamaModel)
    config = kind(
        vocab_size=64,
        hidden_size=d,
        intermediate_size=d_mlp,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=d_head,
    )
    return model(config).eval().requires_grad_(False)


class Measured:
    """Seconds and bytes of the pieces of a fit on one block.

    Args:
        name: Of the model.
        share: One in so many of the d gradients of a Jacobian is taken.
    """

    def __init__(self, name: str, share: int):
        torch.manual_seed(0)
        base = block(name)
        self.parameters = sum(weight.numel() for weight in base.layers[0].parameters())
        _, d, *_ = SIZES[name]
        path = nominal(base, list(base.layers), list(range(1, TOKENS + 1)))
        rows = torch.nn.functional.normalize(torch.randn(max(1, d // share), d), dim=-1)
        path.pull(0, rows[:2])  # the first pass reads weights that nobody has read yet
        self.pull = common.seconds(lambda: path.pull(0, rows)) / len(rows)
        self.pull_bytes = peak(lambda: path.pull(0, rows))
        self.push = common.seconds(lambda: path.push(0, rows[:1]))
        self.push_bytes = peak(lambda: path.push(0, rows[:1]))
        cost, A = CostToGo.scalar(0.1, d, dtype=torch.float32), torch.randn(d, d) / d**0.5
        self.step = common.seconds(lambda: cost.step(A, 0.1, 1.0))
        self.step_bytes = peak(lambda: cost.step(A, 0.1, 1.0))


def report(name: str, measured: Measured, solver: str) -> str:
    layers, d, *_ = SIZES[name]
    # a gradient costs two operations per weight, a tangent by double backward four
    gradient = 2 * measured.parameters
    if solver == "dense":
        seconds = layers * (d * measured.pull + measured.step)
        # Cholesky factor, two triangular solves, K, and five eighths of A' M A
        operations = layers * (d * gradient + (1 / 3 + 2 + 2 + 2 * 5 / 8) * d**3)
        held = max(measured.step_bytes + 8 * d * d, measured.pull_bytes + 8 * d * d)
    elif solver == "output":
        count = layers * (layers + 1) // 2
        seconds, operations, held = count * measured.pull, count * gradient, measured.pull_bytes
    else:
        seconds, operations, held = layers * measured.push, layers * 2 * gradient, measured.push_bytes
    return (
        f"{name:12} {solver:7} {seconds:12.3g} {operations:10.1e} {operations / GPU_RATE:10.2g} "
        f"{held / 1e9:10.2f} {4 * layers * d / 1e6:10.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--solvers", nargs="+", default=["dense", "output", "scalar"])
    parser.add_argument("--share", type=int, default=16)
    arguments = parser.parse_args()
    print(f"one text of {TOKENS} tokens, {torch.get_num_threads()} thread, torch {torch.__version__}")
    print(
        f"{'model':12} {'solver':7} {'CPU s':>12} {'operations':>10} {GPU + ' s':>10} {'peak GB':>10} {'back MB':>10}"
    )
    print(f"{'':20} {'computed':>12} {'computed':>10} {'computed':>10} {'measured':>10} {'computed':>10}")
    for name in arguments.models:
        measured = Measured(name, arguments.share)
        print(
            f"{name:12} measured: a gradient {1e3 * measured.pull:.1f} ms, a tangent {1e3 * measured.push:.0f} ms, "
            f"a Riccati step {measured.step:.1f} s",
            flush=True,
        )
        for solver in arguments.solvers:
            print(report(name, measured, solver), flush=True)


if __name__ == "__main__":
    main()
