"""Controllers from vectors: tensors, and the objects of repeng and steering-vectors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from steerlens.core import Controller
from steerlens.core.types import Layers, Where
from steerlens.hosts.types import Model
from steerlens.laws.single import add
from steerlens.sharing.gguf import from_gguf
from steerlens.sharing.modules import Names
from steerlens.sharing.plain import EVERY_TOKEN

#: A vector, `[d]` or `[head d_head]`.
Numbers: TypeAlias = Tensor | Sequence[float]
#: An object of a library that steerlens does not import, or a file of it; its attributes are checked.
Foreign: TypeAlias = Any
#: What hidden-directions calls a bias that it baked into an MLP.
BAKED = "advocate_bias.pt"


def from_tensor(
    vectors: Mapping[int, Numbers] | Tensor | Sequence[Numbers],
    *,
    layers: Layers = None,
    point: str = "resid_post",
    where: Where = EVERY_TOKEN,
    strength: float = 1.0,
) -> Controller:
    """Steering vectors of your own, one for each layer.

        x_l <- x_l + strength v_l

        sl.sharing.from_tensor({10: v10, 11: v11})
        sl.sharing.from_tensor(stack, layers=[10, 11])

    `steerlens.add` adds one vector, at one layer or several; this is a sum of such controllers.

    Args:
        vectors: By layer, counted from 0: a mapping, or a stack `[layer d]` whose row l is for layer l. At the point
            `z`, `[head d_head]` for each layer. In activation units.
        layers: Those of them to use; default all of a mapping. A stack has a row for every layer of a model, and to
            steer all of them at once is rarely meant: name the layers.
        point: A point of `Site`.
        where: Token positions, see `Loop`; default every token, the first one too.
        strength: Factor, no unit; 0 is off.

    Raises:
        TypeError: no vectors; layers that are not whole numbers.
        ValueError: a stack without `layers`; a layer for which there is no vector; a vector that `add` refuses.
    """
    found = by_layer(vectors, layers)
    loops = [
        loop.replace(name="vector")
        for layer, vector in found.items()
        for loop in add(vector, layer=layer, point=point, where=where, strength=strength)
    ]
    return Controller(loops, {"method": "from_tensor", "arguments": {"point": point, "strength": float(strength)}})


def by_layer(vectors: Any, layers: Layers) -> dict[int, Any]:
    """The vectors that are meant, by layer, in the order of the layers."""
    if isinstance(vectors, Mapping):
        try:
            held = {_layer(layer): vector for layer, vector in vectors.items()}
        except TypeError as error:
            raise TypeError(f"vectors is a mapping of something else than layers: {error}") from None
    else:
        if isinstance(vectors, (str, bytes)) or not hasattr(vectors, "__len__"):
            raise TypeError(f"vectors is a {type(vectors).__name__}; give a mapping by layer, or a stack [layer d]")
        if layers is None:
            raise ValueError("vectors is a stack without layers; name the layers to steer, layers=[10, 11]")
        held = dict(enumerate(vectors))
    wanted = list(held) if layers is None else [_layer(x) for x in ([layers] if _whole(layers) else layers)]  # type: ignore[union-attr]
    missing = [layer for layer in wanted if layer not in held]
    if missing or not wanted:
        what = f"no vector for layer {missing[0]}" if missing else "no layers"
        raise ValueError(f"{what}; there are vectors for the layers {', '.join(map(str, sorted(held))) or 'none'}")
    return {layer: held[layer] for layer in sorted(set(wanted))}


def from_repeng(
    vector: Foreign,
    *,
    layers: Layers = None,
    where: Where = EVERY_TOKEN,
    strength: float = 1.0,
) -> Controller:
    """A control vector of repeng, an object or a file that its `export_gguf` wrote.

        x_l <- x_l + strength v_l    at resid_post of block l

    repeng wraps the blocks whose numbers are in `ControlModel(model, layer_ids)` and adds `coeff * directions[l]` to
    the output of each, at every token that is not padding. `strength` is its `coeff`, `layers` are its `layer_ids`.

    Args:
        vector: `repeng.ControlVector`, or anything with a mapping `directions`; or the path of a GGUF file.
        layers: Layers to steer, counted from 0; default all in the vector. Negative ones cannot be used.
        where, strength: As for `from_tensor`.

    Raises:
        OSError: no such file.
        TypeError: neither a path nor an object with `directions`.
        ValueError: a layer that the vector lacks; a file that `from_gguf` refuses.

    Source: repeng 0.4.0, `repeng/control.py`. Its options `normalize` and `operator` belong to a call, not to a vector,
    and are not imported.
    """
    if isinstance(vector, (str, Path)):
        return from_gguf(vector, layers=layers, where=where, strength=strength)
    directions = getattr(vector, "directions", None)
    if not isinstance(directions, Mapping):
        raise TypeError(f"from_repeng() takes a ControlVector or a GGUF file, it got a {type(vector).__name__}")
    found = from_tensor(_tensors(directions), layers=layers, where=where, strength=strength)
    hint = {"model_hint": str(vector.model_type)} if isinstance(getattr(vector, "model_type", None), str) else {}
    return named(found, "repeng", hint | {"strength": float(strength)})


def from_steering_vectors(
    vector: Foreign,
    *,
    layers: Layers = None,
    model: Model | None = None,
    where: Where = EVERY_TOKEN,
    strength: float = 1.0,
) -> Controller:
    """A `SteeringVector` of the library steering-vectors.

        x_l <- x_l + strength v_l    at the output of the module that its `layer_type` names

    Args:
        vector: The object, or anything with a mapping `layer_activations`. Files of it are pickles, which are not read;
            save `vector.layer_activations` with `torch.save` and give `read_torch(path)` to `from_tensor`.
        layers: Layers to steer, counted from 0; default all in the vector.
        model: Needed for a `layer_type` other than `"decoder_block"`: whether the output of its attention and MLP
            modules is what is added to the residual stream depends on the architecture.
        where: Token positions, see `Loop`; default every token. Its `min_token_index=n` is `slice(n, None)`.
        strength: Its `multiplier`.

    Raises:
        TypeError: no such object.
        ValueError: a layer that the vector lacks; a layer type without a point in this architecture.

    Source: steering-vectors 0.12.2, `steering_vectors/steering_vector.py`. Its operators belong to a call, not to a
    vector: `project_out` does what its ablation operator does.
    """
    activations = getattr(vector, "layer_activations", None)
    if not isinstance(activations, Mapping):
        raise TypeError(f"from_steering_vectors() takes a SteeringVector, it got a {type(vector).__name__}")
    kind = getattr(vector, "layer_type", "decoder_block")
    if kind == "decoder_block":
        point = "resid_post"
    elif kind in ("self_attn", "mlp"):
        point = Names(model, f"layer_type={kind!r}").point_of_branch(kind)
    else:
        raise ValueError(f"layer_type={kind!r}: steerlens has no point at the output of a norm; use decoder_block")
    found = from_tensor(_tensors(activations), layers=layers, point=point, where=where, strength=strength)
    return named(found, "steering_vectors", {"layer_type": kind, "strength": float(strength)})


def from_hidden_directions(
    source: Foreign,
    *,
    layers: Layers = None,
    model: Model | None = None,
    where: Where = EVERY_TOKEN,
    strength: float = 1.0,
) -> Controller:
    """A direction or a baked bias of hidden-directions.

        x_l <- x_l + strength V[l]     at resid_post of block l: a direction, `[layer d]`
        u_l <- u_l + strength b        at mlp_out of block l: a bias that was baked into an MLP, `advocate_bias.pt`

    Args:
        source: Path of a `.pt` file, of a folder with `advocate_bias.pt`, or the tensor itself.
        layers: Layers to steer with a direction, which its file does not name; its manifest recommends one.
        model: Needed for a baked bias: whether the bias of its last MLP matrix is added to the residual stream as it
            is depends on the architecture.
        where, strength: As for `from_tensor`.

    Raises:
        FileNotFoundError: no such file, or a folder without `advocate_bias.pt`.
        ValueError: a direction without `layers`; a file that `read_torch` refuses, or that holds neither; a baked bias
            without `model`, or in an architecture that has no such point.

    Source: hidden-directions 0.1.6, `bake.py`, `load.py`, `extract/pref.py`: row l comes from the output of block l.
    """
    from steerlens.sharing.torchfile import read_torch

    held = source
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.is_dir() and not (path / BAKED).exists():
            raise FileNotFoundError(
                f"the folder {path} has no {BAKED}, which hidden-directions writes; name a file in it"
            )
        held = read_torch(path / BAKED if path.is_dir() else path)
    about: dict[str, Any] = {"strength": float(strength)}
    if isinstance(held, Mapping) and isinstance(held.get("bias"), Tensor) and _whole(held.get("layer")):
        layer = int(held["layer"])
        point = Names(model, "a baked bias").point_of_branch("mlp", last="down_proj")
        if layers is not None and [layer] != ([layers] if _whole(layers) else list(layers)):  # type: ignore[arg-type]
            raise ValueError(f"this bias was baked into layer {layer}; it cannot be used at layers={layers!r}")
        about |= {name: str(held[name])[:500] for name in ("base_model", "note") if isinstance(held.get(name), str)}
        found = from_tensor({layer: held["bias"]}, point=point, where=where, strength=strength)
        return named(found, "hidden_directions", about)
    if not isinstance(held, Tensor) or held.ndim != 2:
        raise ValueError("this holds neither a direction [layer d] nor a baked bias of hidden-directions")
    return named(from_tensor(held, layers=layers, where=where, strength=strength), "hidden_directions", about)


def named(controller: Controller, name: str, arguments: Mapping[str, Any]) -> Controller:
    """An import's loops under its name, with its own recipe."""
    loops = [loop.replace(name=name) for loop in controller]
    return Controller(loops, {"method": f"from_{name}", "arguments": dict(arguments)})


def _tensors(vectors: Mapping[Any, Any]) -> dict[Any, Any]:
    """Arrays as tensors of one dimension; steering-vectors reshapes its own when it adds them."""
    return {layer: torch.as_tensor(vector).detach().flatten() for layer, vector in vectors.items()}


def _layer(value: Any) -> int:
    if not _whole(value):
        raise TypeError(f"{value!r} is no layer; a layer is an integer, counted from 0")
    return int(value)


def _whole(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, (bool, Iterable))
