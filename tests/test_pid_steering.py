"""PID steering against its recursion written with plain PyTorch hooks."""

from __future__ import annotations

import pytest
import torch

import steerlens as sl
from steerlens.models import tiny
from steerlens.testing import Case, discover_hosts
from steerlens.testing.case import NEGATIVE, POSITIVE

PAIRS = sl.Pairs([p + c for p, c in POSITIVE], [p + c for p, c in NEGATIVE], read="mean")


def mean_states(model, texts, controls):
    """Mean state after each block over texts and their tokens but the first, while `controls` are added to these."""
    total = []
    for text in texts:
        seen, handles = [], []

        def hook(_, args, output, t):
            x = output if isinstance(output, torch.Tensor) else output[0]
            seen.append(x[0, 1:].double().mean(0))  # noqa: B023
            x = x.clone()
            x[:, 1:] += controls[t] if t < len(controls) else 0
            return x if isinstance(output, torch.Tensor) else (x, *output[1:])

        for t, block in enumerate(model.model.layers):
            handles.append(block.register_forward_hook(lambda m, a, o, t=t, f=hook: f(m, a, o, t)))
        try:
            with torch.no_grad():
                model(torch.tensor([text]))
        finally:
            for handle in handles:
                handle.remove()
        total.append(torch.stack(seen))
    return torch.stack(total).mean(0)


@pytest.mark.parametrize("sequential", [True, False])
def test_vectors_are_those_of_the_recursion(host, device, sequential):
    model = tiny("llama", host="hf")[0]
    kp, ki, kd = 0.4, 0.2, 0.1
    target, controls, errors = mean_states(model, PAIRS.positive, []), [], []
    for t in range(4):
        r = target[t] - mean_states(model, PAIRS.negative, controls if sequential else [])[t]
        u = kp * r
        if errors:
            u = u + ki * torch.stack(errors).sum(0) + kd * (r - errors[-1])
        errors.append(r)
        controls.append(u.float())
    fitted = sl.pid_steering(
        Case("pid_steering", host, device=device).model, PAIRS, kp=kp, ki=ki, kd=kd, sequential=sequential
    )
    assert [loop.act.layer for loop in fitted] == [0, 1, 2, 3]
    for loop, u in zip(fitted, controls, strict=True):
        torch.testing.assert_close(loop.law.vector.cpu(), u, atol=1e-4, rtol=1e-4)


def test_the_fit_leaves_nothing_behind_and_refuses_a_steered_model():
    case = Case("pid_steering", discover_hosts()[0])
    ids = torch.tensor([case.prompt])
    plain = case.logits(ids)
    controller = case.fit()
    assert torch.equal(case.logits(ids), plain)
    with case.steer(controller=controller), pytest.raises(ValueError, match="under its own controls"):
        case.fit()
    assert torch.equal(case.logits(ids), plain)


def test_gains_that_do_nothing_are_refused():
    with pytest.raises(ValueError, match="other than 0"):
        Case("pid_steering", discover_hosts()[0]).fit(kp=0.0, ki=0.0, kd=0.0)
