"""Trajectory tracking: hold a token on the path that another one took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from steerlens.control.gains import Gains, gains_for
from steerlens.control.linearization import Linearization, check_plant, check_texts
from steerlens.control.regulator import SOLVERS, Weights
from steerlens.control.targets import Aim
from steerlens.core import Controller, Law, Loop, Site
from steerlens.core.types import Layers, Where
from steerlens.fit.card import Card
from steerlens.fit.contrast import Pairs, Text, tokenize
from steerlens.fit.method import method
from steerlens.fit.reading import check_finite, every_layer
from steerlens.fit.retune import Draft, Retune, edited
from steerlens.hosts.types import Model
from steerlens.laws.feedback import FactoredFeedback, Feedback
from steerlens.laws.setpoints import Point


def _retune(draft: Draft) -> None:
    path = draft.changes["path"]
    _check_path(path, draft.found["shape"])
    rows = _rows(path)
    draft.laws(lambda law, loop: edited(law, setpoint=Point(rows[loop.sense.layer].to(law.setpoint.point))))


@method(
    card=Card(needs="texts", points=("resid_post",), derivatives="blocks"),
    retune=Retune(("path",), _retune),
)
def track(
    model: Model,
    data: Pairs | Text | Sequence[Text],
    *,
    path: Tensor | None = None,
    q: float | Sequence[float] = 0.1,
    r: float | Sequence[float] = 1.0,
    qf: float = 0.1,
    solver: Literal["dense", "output"] = "dense",
    layers: Layers = None,
    strength: float = 1.0,
    where: Where = "last",
    linearize_on: int = 4,
    linearization: Linearization | None = None,
    progress: bool = True,
) -> Controller:
    """Hold the residual stream on a nominal trajectory with the gains of a linear quadratic regulator.

        u_t = K_t (r_t - x_t),   r_t = mean_p x_t(last token of p)

    with K_t as in `lqr`, linearised at the same texts p. The whole state is fed back, so the whole gain is kept.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model.
        data: The text whose last token shows the path, or a list of texts, of which the mean path is taken; of `Pairs`,
            the positive ones.
        path: Another path r, `[layer d]`, a row for each block's input; the gains are still those at the texts.
        q, r, qf: Weights of the cost, as for `lqr`.
        solver: `"dense"` weighs the whole distance from the path and keeps K_t as a matrix, `[d d]` a layer.
            `"output"` weighs it along the directions of `Pairs` only, `Q_t = q v_t v_t'`, needs gradients alone, and
            keeps two factors, `[k d]` each, with k the number of later layers.
        layers: Where to act; default all.
        strength: Factor on the control, no unit: 0 is off, and only 1 is the regulator's control.
        where: Token positions, see `Loop`; the paper steers the last token of a prompt. Every selected token is held on
            the same path, so that a whole generation is pushed to repeat one token.
        linearize_on: Take at most this many texts.
        linearization: From `linearize`, instead of the texts: its states are the path.
        progress: Show a progress bar over the layers.

    Returns:
        One loop per layer. Recorded signals: `error` `[batch pos]`, `|r_t - x_t|` in activation units; `u`; `u_norm`.

    Raises:
        TypeError: a path that is not a tensor.
        ValueError: weights that are not positive or not one for each layer, a text of one token, a path of another
            length or width, or not finite, `"output"` without `Pairs` or with identical activations on both sides, a
            linearization of another model.

    Without a refit, by `controller.retuned`: `path`.

    Source: arXiv 2604.19018, tracking of a trajectory. Differences from the authors' code: works with a KV cache and on
    generated tokens, and for a path of several texts.
    """
    if solver == "output" and not isinstance(data, Pairs):
        raise ValueError("solver='output' weighs directions; give steerlens.Pairs, whose differences they are")
    weights = Weights(q, r, qf, model.n_layers)
    controlled = every_layer(model, layers)
    shape = [model.n_layers, model.d_model]
    if path is not None:
        _check_path(path, shape)
    texts = _texts(data, linearize_on)
    if linearization is not None:
        check_plant(model, linearization)
    bos = data.prepend_bos if isinstance(data, Pairs) else None
    tokens = [] if linearization is not None else [tokenize(text, model, bos)[0] for text in texts]
    if linearization is None:
        check_texts(tokens)
    features = [torch.zeros(0, model.d_model)] * (model.n_layers + 1)
    if solver == "output":
        assert isinstance(data, Pairs)
        aim = Aim(data, setpoint="level", level=1.0, origin="zero", angle_rad=None, combine="joint")
        features = [target.basis for target in aim.targets(model).setpoints]
        if not any(bool(rows.any()) for rows in features):
            raise ValueError("both sides have identical activations at every layer; are the texts the same?")
    keep = "factors" if solver == "output" else "matrices"
    gains = gains_for(
        model, tokens, solver, weights, controlled, features, linearization=linearization, keep=keep, progress=progress
    )
    check_finite(gains.states, "the blocks' inputs", model)
    nominal = _rows(gains.states[:-1] if path is None else path)
    loops = [
        Loop(
            _law(Point(nominal[t].clone()), gains, t),
            Site(t, "resid_post"),
            Site(t, "resid_pre"),
            where=where,
            strength=strength,
        )
        for t in sorted(gains.rows)
    ]
    return Controller(loops, {"controller": SOLVERS[solver], "linearized_on": gains.n_texts, "shape": shape})


def _rows(path: Tensor) -> Tensor:
    path = path.detach().cpu()
    return path.to(torch.promote_types(path.dtype, torch.float32)).clone()


def _law(setpoint: Point, gains: Gains, t: int) -> Law:
    like = setpoint.point
    if t in gains.factors:
        return FactoredFeedback(setpoint, *(factor.to(like) for factor in gains.factors[t]))
    return Feedback(setpoint, gains.matrices[t].T.to(like).contiguous())


def _texts(data: Pairs | Text | Sequence[Text], count: int) -> list[Text]:
    if count < 1:
        raise ValueError(f"linearize_on={count}; at least one text is needed")
    if isinstance(data, Pairs):
        return data.positive[:count]
    single = isinstance(data, (str, tuple, Tensor)) or (data and isinstance(data[0], (int, dict)))
    texts = cast(list[Text], [data] if single else list(data))
    if not texts:
        raise ValueError("no text to track; give at least one")
    return texts[:count]


def _check_path(path: Any, shape: Sequence[int]) -> None:
    if not isinstance(path, Tensor):
        raise TypeError(f"path is a {type(path).__name__}; give a tensor [layer d]")
    if list(path.shape) != list(shape):
        raise ValueError(
            f"path has shape {list(path.shape)}; this model needs {list(shape)}, a row for the input of each block"
        )
    if not torch.isfinite(path).all():
        raise ValueError("path is not finite")
