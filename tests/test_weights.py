"""The weights of the regulator: only their ratios matter."""

from __future__ import annotations

import pytest
import torch

import steerlens as sl
from steerlens.core import tensors_of


@pytest.mark.parametrize("solver", ["dense", "output", "scalar"])
@pytest.mark.parametrize("scale", [1e-46, 1e60])
def test_a_common_factor_of_all_weights_does_not_matter(solver, scale, tiny_model):
    model = tiny_model("bridge")
    pairs = sl.Pairs([[1, 2, 3]], [[4, 5, 6]])
    q, r, qf = 0.3, [1.0, 2.0, 0.5, 1.0], 4.0
    plain = sl.lqr(model, pairs, q=q, r=r, qf=qf, solver=solver, progress=False, paper=True)
    scaled = sl.lqr(
        model,
        pairs,
        q=q * scale,
        r=[each * scale for each in r],
        qf=qf * scale,
        solver=solver,
        progress=False,
        paper=True,
    )
    for a, b in zip(plain, scaled, strict=True):
        for x, y in zip(tensors_of(a.law), tensors_of(b.law), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-7)
