"""What A-LQR costs per generated token on all layers of a tiny model, in counts that are the same on every machine."""

from __future__ import annotations

import pytest

from steerlens.testing import Case, counts_of_steering

#: Host -> torch operations and Python calls, `python benchmarks/overhead.py --counts --controllers lqr` at commit
#: 73a7bd5, the last one before signals were functions, with TransformerLens 3.9, nnsight 0.8.1 and torch 2.13.
MOST = {"bridge": (28, 152), "hooked": (16, 160), "nnsight": (28, 179)}


def test_a_lqr_without_a_record_costs_no_more_than_it_did(host):
    case = Case("lqr", host, options={"paper": True})
    found = counts_of_steering(case)
    assert len(case.controller.loops) == 4
    assert 0 < found.operations <= MOST[host][0]
    assert 0 < found.calls <= MOST[host][1]


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
