"""What A-LQR costs per generated token on all layers of a tiny model, in counts that are the same on every machine."""

from __future__ import annotations

import pytest
import torch

from steerlens.testing import Case, counts_of_steering
from steerlens.testing.counts import count_per_token

#: Host -> torch operations and Python calls, `python benchmarks/overhead.py --counts --controllers lqr` at commit
#: 73a7bd5, the last one before signals were functions, with TransformerLens 3.9, nnsight 0.8.1 and torch 2.13.
MOST = {"bridge": (28, 152), "hooked": (16, 160), "nnsight": (28, 179)}


def test_a_lqr_without_a_record_costs_no_more_than_it_did(host):
    case = Case("lqr", host, options={"paper": True})
    found = counts_of_steering(case)
    assert len(case.controller.loops) == 4
    assert 0 < found.operations <= MOST[host][0]
    assert 0 < found.calls <= MOST[host][1]


@pytest.mark.parametrize("method", ["lqr", "pid"])
def test_the_unsteered_pass_beside_a_steered_one_costs_less_than_the_model_alone(host, method):
    """It leaves out the last block and the output matrix, and what is done around it does not grow with the model."""
    case = Case(method, host)
    ids = torch.tensor([case.prompt])
    alone, found = count_per_token(lambda tokens: case.generate(ids, tokens)), counts_of_steering(case)
    assert found.operations < alone.operations
    assert found.calls < 1.05 * alone.calls  # the loops themselves are among them


def test_counts_are_the_same_again(host):
    assert counts_of_steering(Case("lqr", host, options={"paper": True})) == counts_of_steering(
        Case("lqr", host, options={"paper": True})
    )


@pytest.mark.parametrize("method", ["lqr", "pid", "odesteer"])
def test_recording_the_control_alone_costs_a_detach(host, method):
    """`record=("u",)` calls no signal and makes no tensor."""
    case = Case(method, host)
    assert counts_of_steering(case, record=("u",)).operations == pytest.approx(
        counts_of_steering(case).operations + len(case.controller.loops)  # one detach each
    )
