"""MiMiC: matching mean and covariance by affine optimal transport."""

from __future__ import annotations

import torch
from torch import Tensor

from steerlens.core import Controller, Loop
from steerlens.core.types import Layers, Where
from steerlens.fit.card import VECTORS, Card
from steerlens.fit.contrast import Pairs
from steerlens.fit.logistic import linear_probe
from steerlens.fit.method import method
from steerlens.fit.reading import Scale, contrast_states, pick_layers
from steerlens.hosts.types import Model
from steerlens.laws.affine import Transport


@method(
    card=Card(needs="sets", points=VECTORS),
    paper={"ridge": 1e-2, "scale": "absolute"},
)
def mimic(
    model: Model,
    data: Pairs,
    *,
    layers: Layers = None,
    point: str = "resid_post",
    strength: float = 1.0,
    ridge: float = 8.0,
    scale: Scale = "relative",
    gate: bool = False,
    where: Where = "last",
    paper: bool = False,
) -> Controller:
    """Map the mean and the covariance of the negative texts' activations to those of the positive texts'.

        u = s (A (x - m-) + m+ - x),   A = S-^-1/2 (S-^1/2 S+ S-^1/2)^1/2 S-^-1/2,   S = cov + ridge I

    the optimal transport between two Gaussians. Outside the span of the centred activations both covariances are
    `ridge I` and A the identity, so that A - I is kept, exactly, on that span: `[r d]` and `[r r]` instead of `[d d]`.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model.
        data: Contrast texts, the negative ones the source and the positive ones the target; `Pairs.read` selects the
            token whose activation is x.
        layers: Where to act; default the middle layer.
        point: Point of the block, see `Site`.
        strength: s, the fraction of the way; no unit. 1 is the transport.
        ridge: Added to the covariances' diagonal: a share of the negative texts' mean variance over the coordinates,
            or with `scale="absolute"` in squared activation units. With fewer texts than dimensions it determines how
            far a state outside the sample is stretched: single tokens vary far more than the means over texts that
            `Pairs.read` may give. The default has a KL of 0.4 nats per token on SmolLM2 and a
            concept, 0.01 in squared activation units one of 7.
        scale: `"relative"` or `"absolute"`, see `ridge`.
        gate: Move only states that a logistic regression classifies as negative, as ODESteer's comparison does.
        where: Token positions, see `Loop`.
        paper: Take `scale="absolute"` and `ridge=0.01`, if they are not given.

    Returns:
        One loop per layer. The recipe holds, per layer, the ridge in squared activation units. Recorded signals: `u`,
        `u_norm`; with `gate`, `gate` `[batch pos]`, 1 if it acts, else 0.

    Raises:
        ValueError: a layer or point the model does not have; a ridge that is not positive; a point whose state is not
            one vector; fewer than two texts on a side.

    Source: Singh et al. (arXiv 2402.09631). In float64, because the matrix roots fail in float32 if there are fewer
    texts than dimensions; ODESteer's code for it ignores the strength.
    """
    if not 0 < ridge < float("inf"):
        raise ValueError(f"ridge={ridge}; it must be positive and finite, or the covariances have no inverse")
    sites = pick_layers(model, layers, point, default="middle")
    if len(model.shape(sites[0])) != 1:
        raise ValueError(f"mimic maps the state as one vector, which it is not at point={point!r}")
    loops, ridges = [], []
    for site, (positive, negative) in contrast_states(model, data, sites).items():
        size = float(negative.double().var(0, correction=0).mean()) if scale == "relative" else 1.0
        # texts without any spread have no unit of their own
        ridges.append(ridge * (size or 1.0))
        law = transport(positive, negative, ridges[-1], gate=gate)
        loops.append(Loop(law, site, where=where, strength=strength))
    return Controller(loops, {"ridge": ridges})


def transport(positive: Tensor, negative: Tensor, ridge: float, *, gate: bool = False) -> Transport:
    """The optimal map from the Gaussian of `negative [n d]` to that of `positive [n d]`, in their dtype."""
    if min(len(positive), len(negative)) < 2:
        raise ValueError(f"mimic needs two texts on each side; there are {len(positive)} and {len(negative)}")
    target, source = positive.double(), negative.double()
    to, start = target.mean(0), source.mean(0)
    spread = torch.cat([target - to, source - start])
    basis = torch.linalg.qr(spread.T)[0].T if len(spread) < spread.shape[1] else torch.eye(len(to), dtype=to.dtype)
    wanted, given = (_covariance((side - mean) @ basis.T, ridge) for side, mean in ((target, to), (source, start)))
    root, inverse = _power(given, 0.5), _power(given, -0.5)
    stretch = inverse @ _power(root @ wanted @ root, 0.5) @ inverse - torch.eye(len(given), dtype=given.dtype)
    probe = None
    if gate:
        labels = torch.cat([torch.ones(len(target)), torch.zeros(len(source))])
        weights, intercept = linear_probe(torch.cat([target, source]), labels)
        probe = torch.cat([weights, intercept[None]]).to(positive.dtype)
    U, M, m, t = (
        part.to(positive.dtype).contiguous() for part in (basis, (stretch + stretch.T) / 2, start, to - start)
    )
    return Transport(U, M, m, t, probe)


def _covariance(centred: Tensor, ridge: float) -> Tensor:
    return centred.T @ centred / len(centred) + ridge * torch.eye(centred.shape[1], dtype=centred.dtype)


def _power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    # rounding may put the smallest eigenvalue of a product below zero, not below this
    floor = torch.finfo(values.dtype).eps * values[-1]
    return (vectors * values.clamp(min=float(floor)) ** exponent) @ vectors.T
