"""The regulator against reference numbers, scipy and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from steerlens.control.riccati import CostToGo


@pytest.mark.parametrize("kind", ["scalar", "general"])
def test_gains_and_costs_equal_the_reference(oracle, kind):
    A, Q, R = oracle["tiny/A"], oracle[f"tiny/{kind}/Q"], oracle[f"tiny/{kind}/R"]
    cost = CostToGo(oracle[f"tiny/{kind}/Qf"])
    for t in range(3, -1, -1):
        K = cost.step(A[t], Q[t], R[t])
        torch.testing.assert_close(K, oracle[f"tiny/{kind}/K"][t], rtol=0, atol=1e-9)
        torch.testing.assert_close(cost.S, oracle[f"tiny/{kind}/S"][t], rtol=0, atol=1e-9)


def test_a_number_is_that_multiple_of_the_identity():
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    eye = torch.eye(5, dtype=torch.float64)
    number, matrix = CostToGo.scalar(0.3, 5), CostToGo(0.3 * eye)
    torch.testing.assert_close(number.step(A, 0.2, 1.5), matrix.step(A, 0.2 * eye, 1.5 * eye))
    torch.testing.assert_close(number.S, matrix.S)


def test_a_long_horizon_reaches_the_algebraic_solution():
    generator = np.random.default_rng(0)
    A = generator.normal(size=(6, 6)) * 0.4
    expected = scipy.linalg.solve_discrete_are(A, np.eye(6), np.eye(6) * 0.1, np.eye(6) * 2.0)
    cost = CostToGo.scalar(1.0, 6)
    for _ in range(200):
        cost.step(torch.from_numpy(A), 0.1, 2.0)
    np.testing.assert_allclose(cost.S.numpy(), expected, atol=1e-10)


def test_the_cost_of_the_closed_loop_is_the_predicted_one():
    generator = torch.Generator().manual_seed(1)
    plant = torch.randn(7, 4, 4, generator=generator, dtype=torch.float64) * 0.6
    cost, gains = CostToGo.scalar(0.7, 4), {}
    for t in range(6, -1, -1):
        gains[t] = cost.step(plant[t], 0.2, 1.3)
    x = x0 = torch.randn(4, generator=generator, dtype=torch.float64)
    realised = 0.0
    for t in range(7):
        u = -gains[t] @ x
        realised += 0.2 * x @ x + 1.3 * u @ u
        x = plant[t] @ x + u
    realised += 0.7 * x @ x
    torch.testing.assert_close(realised, x0 @ cost.S @ x0, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("q", "r", "qf"), [(0.1, 1, 0.1), (1, 1, 1), (100, 0.1, 1000), (0.1, 10, 1)])
def test_float32_agrees_with_float64(q, r, qf):
    generator = torch.Generator().manual_seed(2)
    plant = torch.eye(32) + torch.randn(30, 32, 32, generator=generator, dtype=torch.float64) / 32**0.5
    single, double = CostToGo.scalar(qf, 32, dtype=torch.float32), CostToGo.scalar(qf, 32)
    for t in range(29, -1, -1):
        low, high = single.step(plant[t], q, r), double.step(plant[t], q, r)
    assert (low - high).norm() / high.norm() < 1e-5


def test_a_control_that_costs_nothing_is_refused():
    with pytest.raises(ValueError, match="R must be positive"):
        CostToGo.scalar(0.0, 3).step(torch.eye(3), 0.0, 0.0)
