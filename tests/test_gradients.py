"""Gradients of a loss with respect to activations: the derivative of what steering does, on every host."""

from __future__ import annotations

import pytest
import torch

import steerlens as sl
from steerlens.core import POINTS
from steerlens.hosts import host_of
from steerlens.testing import Case, discover_hosts, snapshot

IDS = [[3, 17, 25, 29, 41, 22, 9], [7, 30, 31, 32]]
SITES = [sl.Site(layer, point) for layer in (0, 2) for point in POINTS]


def losses(logits):
    """One number a text, of logits at real tokens."""
    return torch.stack([logits[0, -1].square().mean(), logits[1, :4].double().logsumexp(-1).sum().to(logits.dtype)])


def gradients(case, loss=lambda logits: losses(logits).sum(), sites=SITES):
    weights = [[0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.5, 0.5, 0.0]]
    return host_of(case.model).gradients(IDS, weights, sites, loss)


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
@pytest.mark.parametrize("host", discover_hosts())
def test_gradient_is_the_derivative_of_steering(host, family, device):
    """Central differences of the loss under an added vector, in float64 where rounding allows a small step."""
    case = Case("caa", host, family=family, dtype=torch.float64, device=device)
    found = gradients(case)
    # transformers computes RMS norms in float32 also in a float64 model; GPT-2 has none
    step, tolerance = (1e-4, 1e-5) if family == "gpt2" else (1e-3, 5e-3)
    ids = torch.tensor([IDS[0], IDS[1] + [0, 0, 0]])
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    for site in SITES:
        shape = host_of(case.model).shape(site)
        vector = torch.linspace(-1, 2, steps=int(torch.tensor(shape).prod()), dtype=torch.float64).reshape(shape)
        values = []
        for row, where in enumerate((slice(2, 3), slice(1, 3))):
            level = []
            for sign in (1, -1):
                loop = sl.Loop(sl.Add(vector), site, where=where, strength=sign * step)
                with torch.no_grad(), sl.steer(case.model, sl.Controller([loop]), record=None):
                    level.append(losses(case.logits(ids, mask))[row])
            values.append(float(level[0] - level[1]) / (2 * step))
        expected = torch.tensor([values[0], values[1] / 2], dtype=torch.float64)
        product = (found[site] * vector).flatten(1).sum(1)
        torch.testing.assert_close(product, expected, rtol=tolerance, atol=0.1 * tolerance)


def test_gradients_leave_the_model_as_it_was(host, device):
    case = Case("caa", host, device=device)
    module = getattr(case.model, "_module", case.model)
    gradients(case)  # the Bridge installs hooks of its own in its first forward pass
    before = snapshot(case.model)
    flags = [parameter.requires_grad for parameter in module.parameters()]

    def fails(logits):
        raise RuntimeError("the loss fails")

    gradients(case)
    with pytest.raises(RuntimeError, match="the loss fails"):
        gradients(case, fails)
    assert snapshot(case.model) == before
    assert [parameter.requires_grad for parameter in module.parameters()] == flags
    assert all(parameter.grad is None for parameter in module.parameters())


def test_gradients_need_no_parameter_that_asks_for_one(host, device):
    case = Case("caa", host, device=device)
    expected = gradients(case)
    for parameter in getattr(case.model, "_module", case.model).parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        frozen = gradients(case)
    for site in SITES:
        assert torch.equal(frozen[site], expected[site])
