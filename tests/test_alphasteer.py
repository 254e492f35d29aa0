"""AlphaSteer against its matrices in numpy, and against plain PyTorch hooks."""

from __future__ import annotations

import numpy
import pytest
import torch

import steerlens as sl
from steerlens.methods.alphasteer import null_space_complement, sensor
from steerlens.models import tiny
from steerlens.testing import Case, discover_hosts
from steerlens.testing.case import NEGATIVE, POSITIVE

TEXT = [3, 17, 25, 29, 41, 22, 46]
PAIRS = sl.Pairs([p + c for p, c in POSITIVE], [p + c for p, c in NEGATIVE])
SAME = sl.Pairs(PAIRS.negative, PAIRS.negative)


@pytest.mark.parametrize(("benign", "share"), [(5, 0.0), (5, 0.5), (200, 0.4)])
def test_projector_and_solution_are_those_of_the_matrices(benign, share):
    """P from numpy's eigenvectors, Delta from the pseudoinverse that the paper has; nothing of rank one is assumed."""
    d, ridge, random = 24, 3.0, numpy.random.default_rng(0)
    H, X, v = random.normal(size=(benign, d)), random.normal(size=(7, d)), random.normal(size=d)
    values, vectors = numpy.linalg.eigh(H.T @ H)
    kept = max(int((values < 1e-9 * values.max()).sum()), d - int((1 - share) * d))
    P = vectors[:, :kept] @ vectors[:, :kept].T
    rows = null_space_complement(torch.tensor(H), share).numpy()
    numpy.testing.assert_allclose(numpy.eye(d) - rows.T @ rows, P, atol=1e-9)
    Z = X @ P
    solved = P @ numpy.linalg.pinv(Z.T @ Z + ridge * P, rcond=1e-10) @ Z.T @ numpy.tile(v, (7, 1))  # x @ solved = u
    g = sensor(torch.tensor(X), torch.tensor(rows), ridge).numpy()
    numpy.testing.assert_allclose(numpy.outer(g, v), solved, atol=1e-10)
    # no other matrix of this form does better: the gradient of the ridge problem is 0 on the null space
    gradient = P @ (Z.T @ (Z @ solved - v) + ridge * solved)
    numpy.testing.assert_allclose(gradient, 0, atol=1e-9)
    if benign < d:
        assert numpy.abs(H @ g).max() < 1e-12, "benign states are to be left alone"


def test_it_is_the_hook_that_its_equation_describes(host, device):
    model = tiny("llama", host="hf")[0]
    case = Case("alphasteer", host, device=device)
    controller = sl.alphasteer(case.model, PAIRS, layers=2, strength=3.0, where="all")

    def logits(ids, change=None):
        seen = {}

        def hook(_, args, output):
            x = seen["x"] = output if isinstance(output, torch.Tensor) else output[0]
            if change is None:
                return None
            return x + change(x) if isinstance(output, torch.Tensor) else (x + change(x), *output[1:])

        handle = model.model.layers[2].register_forward_hook(hook)
        try:
            with torch.no_grad():
                return model(torch.tensor([ids])).logits[0], seen["x"][0].double()
        finally:
            handle.remove()

    X, H = (torch.stack([logits(text)[1][-1] for text in side]) for side in (PAIRS.positive, PAIRS.negative))
    P = torch.eye(32).double() - torch.linalg.pinv(H) @ H
    Z = X @ P
    delta = P @ torch.linalg.pinv(Z.T @ Z + 10 * P, rtol=1e-9, hermitian=True) @ Z.T @ (X - H).mean(0).expand(3, 32)

    def change(x):
        u = 3.0 * x.double() @ delta
        u[:, 0] = 0
        return u.float()

    expected, _ = logits(TEXT, change)
    with case.steer(controller=controller, record="all") as run:
        torch.testing.assert_close(case.logits(torch.tensor([TEXT]))[0].cpu(), expected, atol=1e-4, rtol=1e-4)
    assert run.record["blocks.2.hook_steer_u_norm"].max() > 0.1
    for text in PAIRS.negative:  # a benign text's last token is left alone
        with case.steer(controller=sl.alphasteer(case.model, PAIRS, layers=2), record="all") as run:
            case.logits(torch.tensor([text]))
        assert run.record["blocks.2.hook_steer_u_norm"][0, -1] < 1e-4


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"share": 1.5}, ValueError, "between 0 and 1"),
        ({"ridge": 0.0}, ValueError, "must be positive"),
        ({"point": "z"}, ValueError, "no point 'z'"),
        ({"condition": ["a"]}, TypeError, "give steerlens.Pairs"),
        (
            {"condition": sl.Pairs(PAIRS.negative, PAIRS.negative), "share": 0.0},
            ValueError,
            "hardly an activation",
        ),
    ],
)
def test_mistakes_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        sl.alphasteer(tiny("llama", host=discover_hosts()[0]), PAIRS, **options)
