"""The demo's table of layers, for levels counted from zero and from the token's own state."""

from __future__ import annotations

import pytest
import torch

import steerlens as sl
from steerlens.models import tiny

demo = pytest.importorskip("steerlens.cli.demo")


class Table(list):
    def __init__(self, *columns, title):
        super().__init__()

    def add_row(self, *cells):
        self.append([float(cell) for cell in cells])


@pytest.mark.parametrize("origin", ["zero", "own"])
def test_setpoint_minus_measured_is_the_error(origin):
    model = tiny("llama", host="bridge")
    pairs = sl.Pairs([[3, 17, 25], [5, 9, 31]], [[4, 18, 26], [6, 10, 32]])
    controller = sl.lqr(model, pairs, layers=[1, 2], origin=origin, level=100.0, linearize_on=1, progress=False)
    with sl.steer(model, controller) as run:
        model(torch.tensor([[3, 17, 25, 29]]))
    rows = demo._layers(Table, controller, run.record)
    assert [row[0] for row in rows] == [1, 2]
    for _, setpoint, measured, error, _ in rows:
        # one token is steered, so that a mean is its own value; cells have two decimals
        assert abs(abs(setpoint - measured) - error) < 0.02
