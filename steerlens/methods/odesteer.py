"""ODESteer: steering by following the gradient of a log-density ratio."""

from __future__ import annotations

from typing import Any, Literal

import torch

from steerlens.core import Controller, Loop, map_tensors
from steerlens.core.law import finite
from steerlens.core.types import Layers, Where
from steerlens.fit.card import VECTORS, Card
from steerlens.fit.contrast import Pairs
from steerlens.fit.method import method
from steerlens.fit.reading import contrast_states, pick_layers
from steerlens.fit.retune import Draft, Retune, edited
from steerlens.flow.barriers import cosine_barrier, exact_barrier, sketched_barrier, truncate
from steerlens.flow.fields import Field, Quadratic
from steerlens.flow.flows import Flow, angle
from steerlens.flow.sketch import TensorSketch
from steerlens.hosts.types import Model


def _retune(draft: Draft) -> None:
    asked = {name: draft.changes.get(name) for name in ("angle_rad", "distance")}
    _check(draft.arguments["mode"], 1, **asked)
    length = _length(**asked)
    draft.laws(lambda law, loop: edited(law, distance=length, radians=asked["distance"] is None))
    draft.arguments.update(asked)
    draft.found["length"] = length


@method(
    card=Card(needs="sets", points=VECTORS),
    retune=Retune(("angle_rad", "distance"), _retune),
)
def odesteer(
    model: Model,
    data: Pairs,
    *,
    layers: Layers = None,
    point: str = "resid_post",
    angle_rad: float | None = None,
    distance: float | None = None,
    mode: Literal["exact", "paper"] = "exact",
    kernel: Literal["polynomial", "fourier"] = "polynomial",
    degree: int = 2,
    gamma: float = 0.1,
    coef0: float = 1.0,
    C: float = 1.0,
    rank: int | None = 8,
    solver: str | None = None,
    steps: int | None = None,
    components: int | None = None,
    sigma: str | float = "median",
    seed: int = 0,
    strength: float = 1.0,
    where: Where = "last",
) -> Controller:
    """Follow the unit gradient of the log-density ratio of the positive and the negative texts.

        u = x(T) - x,   dx/dt = grad h(x) / |grad h(x)|,   x(0) = x
        h(x) = log p+(x) / p-(x) = sum_i a_i (gamma <x_i, x> / |x_i| |x| + coef0)^degree + k

    with a, k from a logistic regression. h depends on the direction of x alone, so that the flow is a motion at unit
    speed on the sphere `|x| = const` towards the positive texts. It is followed in `rank + 2` numbers.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model.
        data: Contrast texts; `Pairs.read` selects the token whose activation is x. The sides may differ in number.
        layers: Where to act; default the middle layer.
        point: Point of the block, see `Site`.
        angle_rad: Length of the flow in radians, T / |x|; default 0.3. Beyond about 0.5 a small model's output suffers.
        distance: Length T in activation units, instead of `angle_rad`. The paper's values, 3 to 23, hold for one model
            and one layer each.
        mode: `"exact"`: the kernel itself, and one Runge-Kutta step of order 4, or the exact great circle if h is
            linear (`rank=0` or `degree=1`). `"paper"`: a tensor sketch of the kernel with 8000 components and ten Euler
            steps; it needs `distance`, keeps all of the sketch whatever the `rank`, and its field has a random part
            (see `TensorSketch`).
        kernel: `"polynomial"`, or `"fourier"` for random Fourier features of x itself, the paper's ablation, whose flow
            changes |x|.
        degree, gamma, coef0: Of the polynomial kernel.
        C: Inverse regularisation of the logistic regression.
        rank: Eigenvectors of the quadratic part that are kept in addition to the linear part; None keeps all and costs
            up to d times as much.
        solver, steps: See `Flow`; `solver="euler", steps=1` is the paper's one-step variant.
        components: Random features of the sketch (default 8000) or of the Fourier kernel (default d).
        sigma: Width of the Fourier kernel, see `cosine_barrier`.
        seed: Of the random features.
        strength: Factor on the control, no unit; only 1 ends on the flow.
        where: Token positions, see `Loop`.

    Returns:
        One loop per layer; `.loops[i].law.field` is the barrier. Recorded signals: `barrier_before`, `barrier_after`
        `[batch pos]`, h before and after, in logits; `angle_rad` `[batch pos]`, the angle moved; `u`; `u_norm`. The
        recipe holds, per layer, the median |x| of the texts and the largest angle at them between the field and the
        one without truncation.

    Raises:
        ValueError: a layer or point the model does not have; both lengths; `mode="paper"` without `distance`; an
            unknown mode, kernel or solver; all activations equal.

    Without a refit, by `controller.retuned`: `angle_rad` or `distance`.

    Source: ODESteer (arXiv 2602.17560). The authors' code stops the regression at a tolerance of 1e-4 and draws the
    sketch from the global random state; here the optimum is exact and the seed explicit. h is bounded on the sphere:
    even a long flow need not reach h >= 0; `barrier_after` shows whether it did.
    """
    _check(mode, degree, angle_rad, distance)
    sites = pick_layers(model, layers, point, default="middle")
    if len(model.shape(sites[0])) != 1:
        raise ValueError(f"odesteer follows the state as one vector, which it is not at point={point!r}")
    length = _length(angle_rad, distance)
    polynomial: dict[str, Any] = {"degree": degree, "gamma": gamma, "coef0": coef0}
    loops, lost, norms = [], [], []
    for site, (positive, negative) in contrast_states(model, data, sites).items():
        states = torch.cat([positive, negative])
        if not bool((states != states[0]).any()):
            raise ValueError(f"both sides have identical activations at {site}; do all texts end in the same token?")
        whole: Field
        if kernel == "fourier":
            whole = cosine_barrier(positive, negative, components=components, sigma=sigma, C=C, seed=seed)
        elif mode == "paper":
            sketch = TensorSketch.draw(states.shape[1], components=components or 8000, seed=seed, **polynomial)
            whole = sketched_barrier(positive, negative, sketch, C=C)
        else:
            whole = exact_barrier(positive, negative, C=C, **polynomial)
        field = whole
        if mode == "exact" and rank is not None and isinstance(whole, Quadratic):
            field = truncate(whole, rank)
        name = solver or ("euler" if mode == "paper" else "circle" if field.straight else "rk4")
        count = steps or (10 if mode == "paper" else 1)
        law = Flow(field, length, steps=count, solver=name, radians=distance is None)
        law = map_tensors(law, lambda t, like=states: t.to(like.dtype) if t.is_floating_point() else t)
        loops.append(Loop(law, site, where=where, strength=strength))
        lost.append(float(angle(whole.velocity(states.double()), field.velocity(states.double())).max()))
        norms.append(float(states.norm(dim=1).median()))
    found = {"length": length, "solver": name, "steps": count, "median_norm": norms, "truncation_rad": lost}
    return Controller(loops, found)


def _length(angle_rad: float | None, distance: float | None) -> float:
    if distance is not None:
        return finite("distance", distance)
    return 0.3 if angle_rad is None else finite("angle_rad", angle_rad)


def _check(mode: str, degree: int, angle_rad: float | None, distance: float | None) -> None:
    if degree < 1:
        raise ValueError(f"degree={degree}; a polynomial kernel has degree 1 at least")
    if angle_rad is not None and distance is not None:
        raise ValueError(f"angle_rad={angle_rad} and distance={distance} are two lengths of one flow; give one")
    if mode == "paper" and distance is None:
        raise ValueError("mode='paper' measures the flow in activation units: give distance=, 3 to 23 in the paper")
