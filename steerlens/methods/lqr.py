"""A-LQR: activation steering as a linear quadratic regulator over the layers."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import Literal, cast

from steerlens.control.gains import foresee, gains_for, react
from steerlens.control.linearization import Blocks, Linearization, Plant, check_plant, check_texts
from steerlens.control.regulator import SOLVERS, Weights
from steerlens.control.targets import (
    AIMS,
    Aim,
    Combine,
    Origin,
    Targets,
    Tracked,
    found_of,
    predicted_of,
    retune_targets,
    tuned,
)
from steerlens.core import Controller
from steerlens.core.types import Json, Layers, Where
from steerlens.fit.card import Card
from steerlens.fit.contrast import Pairs, Text, tokenize
from steerlens.fit.method import method
from steerlens.fit.reading import every_layer
from steerlens.fit.retune import Draft, Retune
from steerlens.hosts import Host
from steerlens.hosts.types import Model
from steerlens.sae.feature import FEATURE_LEVELS, Target, targets_of
from steerlens.sae.reach import acting_layers, check_affine, least_control, retune_reach


def _names(recipe: Json) -> list[str]:
    arguments, found = recipe["arguments"], recipe["found"]
    if "targets" in found:
        return list(FEATURE_LEVELS) if "needs" in found else []
    # a file may be older than what other levels need
    return [] if arguments["preview"] and "predicted" not in found else tuned(arguments)


def _retune(draft: Draft) -> None:
    retune_reach(draft) if "targets" in draft.found else retune_targets(draft)


@method(
    card=Card(
        needs="sets",
        points=("resid_post",),
        derivatives="blocks",
        prompt_passes=2,
        token_passes=2,
        concepts=True,
        features=True,
    ),
    paper={"origin": "zero", "level": 1.0, "q": 0.1, "solver": "dense"},
    only={
        "texts": [*AIMS, "level", "angle_rad", "q", "qf", "solver", "preview", "linearize_on", "full_gain", "paper"],
        "features": ["texts", "limit"],
    },
    retune=Retune(_names, _retune),
)
def lqr(
    model: Model,
    data: Pairs | Sequence[Pairs] | Target | Sequence[Target],
    texts: Sequence[Text] | None = None,
    *,
    level: float | Sequence[float] | None = None,
    setpoint: Tracked = "level",
    origin: Origin | None = None,
    angle_rad: float | None = None,
    combine: Combine = "joint",
    q: float | Sequence[float] = 1e-4,
    r: float | Sequence[float] = 1.0,
    qf: float = 0.1,
    solver: Literal["dense", "output", "scalar"] = "scalar",
    preview: bool = False,
    layers: Layers = None,
    strength: float = 1.0,
    where: Where = "last",
    linearize_on: int | Sequence[Text] = 4,
    linearization: Linearization | None = None,
    limit: float | None = 1.0,
    full_gain: bool = False,
    paper: bool = False,
    progress: bool = True,
) -> Controller:
    """Track a semantic setpoint at every layer with the gains of a linear quadratic regulator.

    The blocks are a plant in the residual stream x of the token that is steered, linearised by their Jacobians A_t:

        x_{t+1} = f_t(x_t) + u_t,   u_t = K_t e_t,   e_t = (beta_t - <v_t, x_t>) v_t,   beta_t = s mu_t (+ origin)
        K_t = (S_{t+1} + R)^-1 S_{t+1} A_t,   S_t = Q + A_t' S_{t+1} (A_t - K_t),   S_T = Qf

    with mu_t v_t the mean difference of the contrast texts before block t. The error is sensed before each block and
    the control added after it, on the state as all earlier controls have left it. Only g_t = K_t v_t is kept: one dot
    product and one vector addition per layer and token.

    Three solvers, which are three controllers:

    - `"dense"`, A-LQR: the cost weighs the whole state, `Q = q I`. Exact; d gradients of every block and text. In
      addition to the model and what is kept it holds S, A_t and 2 d^2 floats (8 MB in narrow models) for the gradients,
      then S, A_t and two matrices to work with: some 4 d^2 floats of 4 bytes at the peak, for any number of texts and
      layers, and twice the bytes for a float64 model. `full_gain` keeps d^2 a layer on the CPU.
    - `"output"`, output-weighted LQR: the cost weighs the features alone, `Q_t = q v_t v_t'`, over the rows v of the
      setpoint's basis. Exact; T(T+1)/2 gradients for each text, no [d d] matrix. Its control is weaker in early layers.
      With `preview` it answers the errors that the later layers are predicted to have, instead of the present
      layer's: `u_t = sum_s p_{t,s} (beta_s - <v_s, x_s predicted>)`, s > t. That is the optimum for a plant that is
      linear around the nominal texts, at every layer, also at a layer that has no direction of its own.
    - `"scalar"`, an approximation of A-LQR: S is approximated by a multiple of the identity, as if every A_t were
      orthogonal, `g_t = m_t A_t v_t`; one tangent a layer. On a 30-layer model the error of its gains is 10 to 70 %.

    A feature of an autoencoder at layer L, `lqr(model, sae.feature(sae, i, level=...), texts)`, is reached through the
    layers before it with the least control. This is the regulator of `"output"` with `preview`, whose last cost has
    infinite weight and whose others are 0:

        minimise  sum_t r_t |u_t|^2   subject to   z_L in its range,   x_{t+1} = f_t(x_t) + u_t
        u_t = Z_{t+1}' G_t^-1 (z* - z_predicted) / r_t,   z_predicted = Z_t (x_t - path_t) + z(path_L)
        G_t = sum_{s >= t} Z_{s+1} Z_{s+1}' / r_s,   Z_t = W_enc A_L ... A_t

    with z the pre-activation, z* the nearest one in the range, the path that of the texts, and s over the layers that
    act. The layers before L act on a linear model; the loop at L senses where it acts and corrects what remains along
    the encoder row, so that the level is reached exactly. With `layers=[L]` it is `sae.hold` along the encoder. A list
    of targets, one a layer, reaches each at its layer: their rows are stacked, and the loop at each senses its own.
    How much the earlier layers save depends on how well the linear model predicts; `diagnose.reach` reports it.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model.
        data: Contrast texts; `Pairs.read` selects the token whose activation is used. A list of `Pairs` steers several
            concepts at once; Jacobians are then taken on the first one's texts. Or a target from `sae.feature` at a
            `resid_post`, or a list of them; their `along` does not matter here.
        texts: For features: linearise at the last token of each; Jacobians and path are means over them.
        level: s, the level in units of the class separation mu_t (lambda in the paper); one number, or one for each
            concept; default 2. 0 holds the feature at the origin; with `origin="own"` it is off, to the last bit.
        setpoint: `"level"`, as above, or `"angular"`: the state is turned in the plane of v_t and the first principal
            component of all mean differences, keeping its length there, see `steerlens.laws.setpoints.Angle`.
        origin: Where levels are counted from: `"own"`, the default for levels: the unsteered state of the same token,
            `beta_t = s mu_t + <v_t, x_t unsteered>`, see `steerlens.laws.relative.Relative`. Then a second pass of the
            model, unsteered and up to the last steered layer, accompanies every steered one, with a KV cache of its
            own; no gradient flows through its states. The others cost nothing: `"zero"` (the paper), `"negative"` (the
            negative texts' mean, so that level 1 asks for the positive texts' mean) or `"midpoint"` of the two means.
        angle_rad: Of the angular setpoint, in radians: 0 (default) points to the positive texts, pi away from them.
        combine: `"joint"` holds all concepts' levels at once; `"independent"` adds up single errors, as the authors
            do, so that overlapping directions pull twice.
        q, r: Weights of the state and of the control, times the identity; one number, or one for each layer. Only the
            ratios of q, r and qf matter. A larger r asks for less control; a small q, as by default, asks for the level
            at the end and not on the way, and acts less in early layers.
        qf: Weight of the last state.
        solver: See above.
        preview: See above; only with `solver="output"` and levels.
        layers: Where to act; default all. The cost still counts the others, through which the state moves freely. For
            features all up to the last of them; without their own layers what remains is not corrected.
        strength: Factor on the control, no unit: 0 is off, and only 1 is the regulator's control.
        where: Token positions, see `Loop`. `"last"` is A-LQR; A-LQR+ steers all of them: `"all"`, or
            `slice(0, None)` with position 0, as in the authors' code.
        linearize_on: Texts whose last token the Jacobians are taken at, or how many of the positive texts to take
            (all, if there are fewer). What is averaged over them is the Jacobian of each block, for every solver;
            gradients through several blocks are products of the averages.
        linearization: Jacobians from `linearize`, used instead of `linearize_on`: a sweep over weights, setpoints and
            levels then costs seconds.
        limit: For features: refuse a level for which the linear model needs, on the mean path, a control of more than
            this share of the residual stream's norm at the last feature, where it does not hold. None: no limit.
        full_gain: Keep K_t in `controller.loops[i].law.matrix`, `[d d]` per layer, for inspection.
        paper: Take the paper's setting for what is not given: `origin="zero"`, `level=1`, `q=0.1`, `solver="dense"`.
        progress: Show a progress bar over the layers.

    Returns:
        One loop per layer, but none at a layer at which both sides have identical activations, such as layer 0 if
        all texts end in the same token. Recorded signals: `error` `[batch pos]`, distance to
        the setpoint, and `projection` `[batch pos]`, `<v_t, x_t>`, in activation units (`projection_0`, `projection_1`
        and so on for several concepts); with `origin="own"` also `reference`, `<v_t, x_t unsteered>`, or `reference_0`,
        `reference_1` and so on; `angle_rad` with the angular setpoint; `predicted_error` with `preview`, the norm of
        the predicted errors of later layers; `u`; `u_norm`. The recipe's `controller` names what the solver computes.
        For features one loop for each layer that acts; signals `error` `[batch pos]`, how far x would have to move
        here, in units of the residual stream, and `feature` `[batch pos]`, the activation predicted for the feature's
        layer (there: the activation), in units of the autoencoder; `feature_12`, ... for several, `feature_12at5`, ...
        for several layers.

    Raises:
        TypeError: data that are neither `Pairs` nor features.
        ValueError: weights that are not positive or not one for each layer, a text of one token to linearise on, an
            unknown option, sides with identical activations at every layer, a linearization of another model. For
            features: no texts, an option of contrast texts, a layer after the last feature or none before the first,
            two targets at a layer, another point than `resid_post`, an autoencoder that normalises its input or does
            not fit the model, features that cannot be moved apart, a level beyond the limit (the message has the
            bound).

    Warns:
        UserWarning: sides with identical activations at some layers; it names them.

    Without a refit, by `controller.retuned`: `level` or `angle_rad`; of features `level`, `at_least`, `at_most`.

    Source: arXiv 2604.19018. Differences from the authors' code: exact Jacobians of one token against its KV cache
    instead of the whole sequence (equal, an order of magnitude faster); S symmetric to the last bit and streamed
    backwards, so that no [T d d] tensor exists, in float32 for a float32 model (gains agree with float64 to 1e-5);
    position 0 is left alone by `where="all"`; several concepts are joint.
    """
    features = targets_of(model, data)
    if features:
        check_affine(features)
        acting = acting_layers(
            features, every_layer(model, layers), named=layers is not None and not isinstance(layers, str)
        )
        prices = Weights(1.0, r, 1.0, model.n_layers).r
        return least_control(
            features,
            _plant(model, texts, linearization),
            {t: prices[t] for t in acting},
            device=model.device,
            where=where,
            strength=strength,
            limit=limit,
            progress=progress,
        )
    data = cast("Pairs | Sequence[Pairs]", data)
    aim = Aim(data, setpoint=setpoint, level=level, origin=origin, angle_rad=angle_rad, combine=combine)
    _check_solver(solver, preview, setpoint)
    weights = Weights(q, r, qf, model.n_layers)
    asked = every_layer(model, layers)
    if linearization is not None:
        check_plant(model, linearization)
    tokens = [] if linearization is not None else _nominal_tokens(model, aim.concepts[0], linearize_on)
    targets = aim.targets(model)
    controlled = asked if preview else [t for t in asked if targets.asks(t)]
    _check_directions(asked, controlled, targets)
    bases = [target.basis for target in targets.setpoints]
    keep = "matrices" if full_gain else "factors" if preview else "rows"
    gains = gains_for(
        model, tokens, solver, weights, controlled, bases, linearization=linearization, keep=keep, progress=progress
    )
    loops = []
    for t in sorted(gains.rows):
        law = foresee(t, gains, targets) if preview else react(t, gains, targets)
        loops.append(targets.loop(t, law, where=where, strength=strength))
    found = {
        "controller": SOLVERS[solver] + (" with preview" if preview else ""),
        "linearized_on": gains.n_texts,
        **found_of(targets),
    }
    if preview:
        found |= predicted_of(targets, gains.features)
    return Controller(loops, found)


def _plant(host: Host, texts: Sequence[Text] | None, linearization: Linearization | None) -> Plant:
    """The linear model for features: of the texts, or the one that was made before."""
    if linearization is not None:
        if texts:
            raise ValueError("give texts to linearise on or a linearization, not both")
        check_plant(host, linearization)
        return linearization
    if texts is None:
        raise ValueError("lqr() of a feature needs texts to linearise on: lqr(model, feature, texts)")
    if isinstance(texts, str):
        raise ValueError(f"texts={texts!r} is a single string; give a list of texts: [{texts!r}]")
    return Blocks(host, [tokenize(text, host)[0] for text in texts])


def _nominal_tokens(host: Host, data: Pairs, linearize_on: int | Sequence[Text]) -> list[list[int]]:
    """Token ids of the texts to linearise on."""
    if isinstance(linearize_on, int):
        if linearize_on < 1:
            raise ValueError(f"linearize_on={linearize_on}; at least one text is needed")
        side = data[:linearize_on].sides(host)[0]
        # up to the token that is read, where a single one is
        tokens = [ids[: _last_read(weights) + 1] for ids, weights in zip(side.tokens, side.weights, strict=True)]
    else:
        tokens = [tokenize(text, host, data.prepend_bos)[0] for text in linearize_on]
    check_texts(tokens)
    return tokens


def _last_read(weights: Sequence[float]) -> int:
    return max(position for position, weight in enumerate(weights) if weight)


def _check_solver(solver: str, preview: bool, setpoint: str) -> None:
    if preview and solver != "output":
        raise ValueError(f"preview=True needs solver='output', it is {solver!r}")
    if preview and setpoint != "level":
        raise ValueError(f"preview=True predicts levels; setpoint={setpoint!r} has none")


def _check_directions(expected: Collection[int], controlled: Collection[int], targets: Targets) -> None:
    if not targets.mu.any() or not controlled:
        raise ValueError("both sides have identical activations at every layer; are the texts the same?")
    zero = [t for t in expected if not targets.asks(t)]
    if zero:
        same = " (at layer 0 whenever all texts end in the same token)" if zero[0] == 0 else ""
        warnings.warn(
            f"both sides have identical activations at layers {zero}{same}: these layers are not controlled",
            stacklevel=4,
        )
