"""What a controller is checked against before it touches a model; travels to servers, so it names no module of ours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steerlens.core import POINTS, Site

if TYPE_CHECKING:
    from steerlens.hosts.blocks.nominal import Nominal


class Dimensions:
    """Abstract: a model's sizes, and whether a controller fits them.

    Attributes:
        model: The user's object.
        n_layers, d_model, n_heads, d_head, d_mlp, d_vocab: Its dimensions; `n_heads` counts query heads.
        name: What the model was loaded as; empty where that is not known.
        quantised: Whether its matrices are held in fewer bits than they compute in.
        processed: Whether the weights were folded or centred, which changes the basis of the residual stream.
    """

    model: Any
    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_mlp: int | None
    d_vocab: int
    processed: bool = False
    name: str = ""
    quantised: bool = False

    @property
    def device(self) -> torch.device:
        """Where the first block's weights are."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first block's weights."""
        raise NotImplementedError

    def nominal(self, tokens: Sequence[int]) -> Nominal:
        """The unsteered path of the last token through the blocks, its context frozen."""
        raise NotImplementedError

    def points(self) -> Sequence[str]:
        """Points of `core.POINTS` that every block of this model has."""
        blocks = range(self.n_layers)
        return [point for point in POINTS if not any(self.missing(Site(layer, point)) for layer in blocks)]

    def missing(self, site: Site) -> str | None:
        """Why there is no such site, as the end of a sentence about its block; None where there is one."""
        raise NotImplementedError

    def doubts(self, sites: Sequence[Site]) -> str | None:
        """What speaks against points that are known, a sentence; None where nothing does, or nothing can be run."""
        return None

    def _width(self, site: Site) -> int | None:
        """Width of `z`, all heads together, or of `mlp_post` in one block; None for what the model says as a whole."""
        return None

    def neuron_writes(self, layer: int) -> Tensor:
        """What one unit of each neuron's `mlp_post` writes, `[d_mlp d_model]`, before any norm of the branch.

        Raises:
            NotImplementedError: the weights are not here, or the block has no such matrix.
        """
        weight = self._out_weight(layer)
        self.need_plain_matrices()
        if weight is None or weight.device.type == "meta":
            raise NotImplementedError("the output weights of the MLP are not here; build the model with its weights")
        return weight.detach() if weight.shape[0] == self.d_mlp else weight.detach().T

    def _out_weight(self, layer: int) -> Tensor | None:
        """The output matrix of a block's MLP, whichever way round it is stored; None where there is none."""
        raise NotImplementedError

    def probe(self) -> list[float] | None:
        """A few weights of the last block that fine-tuning changes and folding does not; None if they are not here."""
        weight = self._probed()
        if weight is None or weight.device.type == "meta":
            return None
        # whichever way round it is stored
        row = weight[0, :8] if weight.shape[0] == self.d_model else weight[:8, 0]
        return [round(float(value), 6) for value in row.detach().float()]

    def _probed(self) -> Tensor | None:
        """The matrix of which `probe` tells a few numbers; None if none is there in floating point."""
        return self._out_weight(self.n_layers - 1)

    def adapter(self) -> list[float]:
        """A few numbers of the adapter of PEFT that is at work beside the weights; empty if there is none."""
        return []

    def apart(self) -> str | None:
        """Why the parameters are not in one place, a sentence; None where they are."""
        return None

    def need_plain_matrices(self) -> None:
        """Raises NotImplementedError if the weights cannot be read as matrices of numbers."""
        if self.quantised:
            raise NotImplementedError("the output weights of this model are quantised; fit on full precision")

    def need_parameters(self) -> None:
        """Raises NotImplementedError where the parameters are not those of the published model."""
        if self.quantised:
            raise NotImplementedError(
                "the weights of this model are quantised, so that no small step of its parameters exists; use the "
                "model at full precision"
            )
        apart = self.apart()
        if apart is not None:
            raise NotImplementedError(apart)

    def shape(self, site: Site) -> tuple[int, ...]:
        """Shape of the state at a site, without batch and position."""
        if site.point == "z":
            width = self._width(site)
            return self.n_heads, self.d_head if width is None else width // self.n_heads
        if site.point == "mlp_post":
            return (self._width(site) or self.d_mlp or 0,)
        return (self.d_model,)

    def check(self, sites: Iterable[Site]) -> None:
        """Raises ValueError for a layer or point that the model does not have, or of which it is not certain."""
        sites = list(sites)
        for site in sites:
            if site.layer >= self.n_layers:
                last = self.n_layers - 1
                raise ValueError(
                    f"no hook point '{site}' in a model of {self.n_layers} layers; the last is blocks.{last}"
                )
            reason = self.missing(site)
            if reason is not None:
                points = ", ".join(point for point in POINTS if not self.missing(Site(site.layer, point)))
                raise ValueError(
                    f"no '{site}' in this {type(self.model).__name__}: block {site.layer} {reason}; it has {points}"
                )

    def trust(self, sites: Iterable[Site]) -> None:
        """As `check`, and once per model a short pass: raises ValueError also for points that it speaks against."""
        sites = list(sites)
        self.check(sites)
        doubts = self.doubts(sites)
        if doubts is not None:
            raise ValueError(doubts)

    def fingerprint(self) -> dict[str, Any]:
        """What decides whether a controller fitted on one model may be attached to another."""
        return {
            "n_layers": self.n_layers,
            "d_model": self.d_model,
            "n_heads": self.n_heads,
            "d_vocab": self.d_vocab,
            "processed": self.processed,
            "probe": self.probe(),
            "name": plain_name(self.name),
        } | ({"adapter": adapter} if (adapter := self.adapter()) else {})

    def differences(self, fingerprint: dict[str, Any]) -> list[str]:
        """How this model differs from the one a controller was fitted on, in words; empty where it does not."""
        mine, found = self.fingerprint(), []
        for key in ("n_layers", "d_model", "n_heads", "d_vocab"):
            if key in fingerprint and fingerprint[key] != mine[key]:
                found.append(f"{key} is {mine[key]}, it was {fingerprint[key]}")
        if fingerprint.get("processed", self.processed) != self.processed:
            was, now = ("raw", "processed") if self.processed else ("processed", "raw")
            found.append(f"this model has {now} weights, it was fitted on {was} ones (folded norms, centred writes)")
        theirs, ours = fingerprint.get("probe"), mine["probe"]
        if not found and theirs and ours and not _close(theirs, ours) and not self._rounds(fingerprint):
            found.append("the weights differ (same architecture, other training)")
        theirs, ours = fingerprint.get("adapter"), mine.get("adapter")
        if not found and theirs and ours and not (len(theirs) == len(ours) and _close(theirs, ours)):
            found.append("the adapter of PEFT differs (same weights beside it)")
        return found

    def remark(self, fingerprint: dict[str, Any]) -> str | None:
        """What a user should know of a controller that may be attached; None where there is nothing."""
        mine = self.adapter()
        if bool(fingerprint.get("adapter")) != bool(mine) and (mine or self.probe()):
            here, there = ("one", "none") if mine else ("none", "one")
            return (
                f"this model has {here} of PEFT's adapters beside its weights, the controller was fitted on one with "
                f"{there}: both are the same model only if the adapter has been merged into the other's weights"
            )
        theirs, ours = fingerprint.get("probe"), self.probe()
        if not self.quantised or not theirs or (ours and _close(theirs, ours)):
            return None
        return (
            "the weights of this model are quantised and the controller was fitted on others, at full precision for "
            "all that is known: its gains are those of that model"
        )

    def _rounds(self, fingerprint: dict[str, Any]) -> bool:
        """Whether this is the quantised form of the model of a fingerprint, by name."""
        return self.quantised and bool(self.name) and plain_name(self.name) == plain_name(fingerprint.get("name") or "")


def plain_name(name: str) -> str:
    """What a model is called, without the folders of the machine that it was loaded on.

    `org/name` stays as it is; a folder of the Hub's cache is `org/name`, any other folder its own name.
    """
    parts = name.replace("\\", "/").rstrip("/").split("/")
    for part in parts:
        if part.startswith("models--"):
            return "/".join(part.split("--")[1:])
    is_folder = name[:1] in ("/", ".", "~") or ":" in parts[0] or len(parts) > 2
    return parts[-1] if is_folder else name


def _close(a: Sequence[float], b: Sequence[float]) -> bool:
    scale = math.sqrt(sum(value * value for value in a)) or 1.0
    # bfloat16 keeps eight bits: two copies of one model in different dtypes agree to 1e-2
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True))) / scale < 2e-2
