"""What the fitting functions of the methods share."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from operator import index
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from steerlens.core import Site
from steerlens.core.types import Layers
from steerlens.fit.contrast import Pairs
from steerlens.hosts import Host

#: What the size of a control is given in: shares of the states' norm, or activation units.
Scale: TypeAlias = Literal["relative", "absolute"]


def every_layer(host: Host, layers: Layers) -> list[int]:
    """Layers as a sorted list, all of them for None and `"all"`; negative ones count from the last.

    Raises:
        TypeError: not a number or numbers.
        ValueError: a layer the model does not have, one named twice, or none at all.
    """
    if layers is None or (isinstance(layers, str) and layers == "all"):
        return list(range(host.n_layers))
    # numpy's and torch's integers and arrays of them are as good as Python's
    single = isinstance(layers, int) or getattr(layers, "ndim", 1) == 0
    try:
        given = [index(layer) for layer in ([layers] if single else list(layers))]  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"layers={layers!r}; give a layer's number, a list of numbers, 'all', or None") from None
    if not given:
        raise ValueError("layers is empty; name at least one")
    counted = [layer + host.n_layers if layer < 0 else layer for layer in given]
    for asked, layer in zip(given, counted, strict=True):
        if not 0 <= layer < host.n_layers:
            raise ValueError(f"no layer {asked} in a model of {host.n_layers} layers; the last is {host.n_layers - 1}")
    if len(set(counted)) != len(counted):
        raise ValueError(f"layers={given} names a layer twice")
    return sorted(counted)


def pick_layers(host: Host, layers: Layers, point: str, *, default: str) -> list[Site]:
    """Sites of a method that acts at one point of some layers; `default` is "all", "middle" or "fifth" of the depth."""
    if layers is None and default != "all":
        layers = host.n_layers // 2 if default == "middle" else host.n_layers // 5
    sites = [Site(layer, point) for layer in every_layer(host, layers)]
    host.check(sites)
    return sites


def contrast_states(host: Host, data: Pairs, sites: Sequence[Site]) -> dict[Site, tuple[Tensor, Tensor]]:
    """Activations of the positive and of the negative texts at each site, `[text ...]`, float32, on the CPU.

    Raises:
        TypeError: `data` is not `Pairs`.
        ValueError: an activation is not finite.
    """
    check_contrast(data)
    read = []
    for side in data.sides(host):
        read.append(host.read(side.tokens, side.weights, sites))
        for site, values in read[-1].items():
            check_finite(values, site, host)
    return {site: (read[0][site], read[1][site]) for site in read[0]}


def contrast_means(host: Host, data: Pairs, sites: Sequence[Site]) -> tuple[dict[Site, Tensor], dict[Site, Tensor]]:
    """Mean activation of the positive and of the negative texts at each site; raises as `contrast_states`."""
    states = contrast_states(host, data, sites)
    means = [
        {site: pair[side].double().mean(0).to(pair[side].dtype) for site, pair in states.items()} for side in (0, 1)
    ]
    return means[0], means[1]


def check_option(name: str, value: Any, known: Collection[Any]) -> None:
    """Raises ValueError unless an argument is one of its known values; the message lists them."""
    if value not in known:
        raise ValueError(f"{name}={value!r}; it is one of {', '.join(map(repr, known))}")


def mean_norm(x: Tensor) -> float:
    """Mean over the texts of the norms of their states, `[text ...] -> number`."""
    return float(torch.linalg.vector_norm(x.flatten(1), dim=-1).mean())


def check_finite(values: Tensor, where: Site | str, host: Host) -> None:
    """Raises ValueError unless all activations read from a model are finite."""
    if not torch.isfinite(values).all():
        raise ValueError(f"an activation at {where} is not finite; is the model's dtype {host.dtype} too narrow?")


def check_vectors(method: str, point: str) -> None:
    """Raises ValueError for the point whose states are one vector for each head, in a method of one vector a token."""
    if point == "z":
        raise ValueError(f"{method}() has no point 'z', whose states are one vector for each head; use 'attn_out'")


def check_gains(kp: float, ki: float, kd: float) -> None:
    """Raises ValueError unless the gains of a PID controller are finite and not all 0."""
    if not all(map(math.isfinite, (kp, ki, kd))) or not any((kp, ki, kd)):
        raise ValueError(f"kp={kp}, ki={ki}, kd={kd}; the gains must be finite, and one of them other than 0")


def check_contrast(data: Any) -> None:
    """Raises TypeError unless the data are `Pairs`."""
    if not isinstance(data, Pairs):
        raise TypeError(f"data is a {type(data).__name__}; give steerlens.Pairs(positive=[...], negative=[...])")


def check_concepts(data: Any) -> None:
    """Raises TypeError unless the data are `Pairs` or a list of them, ValueError if the list is empty."""
    for pairs in [data] if isinstance(data, Pairs) else list(data):
        if not isinstance(pairs, Pairs):
            raise TypeError(
                f"data holds a {type(pairs).__name__}; give steerlens.Pairs(positive=[...], negative=[...]), "
                "or a list of them, one for each concept"
            )
    if not isinstance(data, Pairs) and not data:
        raise ValueError("data is empty; give at least one steerlens.Pairs")


def check_paired(method: str, data: Pairs) -> None:
    """Raises TypeError unless the data are `Pairs`, ValueError unless every positive text has its negative one."""
    check_contrast(data)
    if len(data.positive) != len(data.negative):
        raise ValueError(
            f"{method} needs pairs; there are {len(data.positive)} positive, {len(data.negative)} negative texts"
        )


def unit(vector: Tensor, site: Site) -> Tensor:
    """`v / |v|`; a zero vector raises ValueError."""
    norm = vector.norm()
    if norm == 0:
        raise ValueError(f"both sides have identical activations at {site}; do all texts end in the same token?")
    return vector / norm


def numbers(name: str, given: Any) -> Any:
    """A number, or a list of numbers, as floats.

    Raises:
        TypeError: it is neither.
    """
    try:
        return torch.as_tensor(given, dtype=torch.float64).tolist()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}={given!r}; give a number, or a list of numbers") from error
