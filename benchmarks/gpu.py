"""The same ratios on a GPU: float32 and bfloat16 decoding, and the fit. Says so where there is no GPU.

python benchmarks/gpu.py
"""

from __future__ import annotations

import sys

import common
import torch

import steerlens as sl
from steerlens.models import smollm2
from steerlens.testing import Case


def main() -> None:
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was measured")
        return
    pairs = sl.shipped("sentiment")[:4]
    prompt = torch.tensor([[57, 3514, 288, 260, 725, 15238, 1596, 3163, 284]] * 8)
    print(f"{torch.cuda.get_device_name()}, SmolLM2-135M, batch 8, 32 tokens, wall time")
    for dtype in (torch.float32, torch.bfloat16):
        for host in ("bridge", "nnsight"):
            model = smollm2(host=host, device="cuda", dtype=dtype)
            case = Case("lqr", host, device="cuda", dtype=dtype, model=model)
            fit = common.seconds(
                lambda model=model: sl.lqr(model, pairs, linearize_on=1, progress=False, paper=True), "cuda"
            )
            controller = sl.lqr(model, pairs, linearize_on=1, progress=False, paper=True)

            def steered(case=case, controller=controller, model=model):
                with sl.steer(model, controller, record=None):
                    case.generate(prompt, 32)

            calls = {"unsteered": lambda case=case: case.generate(prompt, 32), "lqr": steered}
            calls["unsteered"]()
            times = common.paired(calls, 6, "cuda")
            cost = 100 * (common.ratio(times["lqr"], times["unsteered"]) - 1)
            print(f"{dtype!s:15} {host:8} fit {fit:5.2f} s, decoding steered {cost:+.1f}%")


if __name__ == "__main__":
    sys.exit(main())
