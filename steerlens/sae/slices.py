"""The part of a sparse autoencoder that is needed to measure and move a few of its features."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steerlens.core import Site
from steerlens.core.types import Autoencoder
from steerlens.hosts import Host

#: Architectures whose activation is a rectified pre-activation of the feature alone, and those where it must also be
#: among the k largest: of these the pre-activation is held, and the activation is that or 0.
ALONE = ("standard", "jumprelu", "gated")
AMONG = ("topk", "batchtopk", "matryoshka_batchtopk")


@dataclass(frozen=True)
class Slices:
    """Rows of an autoencoder in one form, `activation = max(z, 0) if z > threshold`, `z = <sensor, x> / s(x) + bias`.

    Attributes:
        sensor: `[m d]`.
        bias, threshold: `[m]`.
        decoder: What one unit of activation writes, `[m d]`.
        normalise: See `steerlens.sae.Feature`.
    """

    sensor: Tensor
    bias: Tensor
    threshold: Tensor
    decoder: Tensor
    normalise: str


def architecture(sae: Autoencoder) -> str:
    """Name of the autoencoder's architecture.

    Raises:
        TypeError: it is not one of sae-lens's, or of a kind whose features cannot be held one by one.
    """
    named = getattr(getattr(sae, "cfg", None), "architecture", None)
    if named is None or not hasattr(sae, "W_enc"):
        raise TypeError(f"{type(sae).__name__} is not an autoencoder of sae-lens; load one with sae_lens.SAE")
    kind = named() if callable(named) else str(named)
    if kind not in (*ALONE, *AMONG):
        where = (
            " reads at one hook point and writes at another"
            if "transcoder" in kind
            else " has no activation per feature"
        )
        raise TypeError(f"architecture {kind!r}{where}; features of {', '.join((*ALONE, *AMONG))} can be held")
    return kind


def check_indices(sae: Autoencoder, index: int | Sequence[int]) -> list[int]:
    """Feature indices as a list.

    Raises:
        IndexError: one outside the autoencoder.
        ValueError: none, or one twice.
    """
    indices = [int(index)] if isinstance(index, int) else [int(entry) for entry in index]
    size = sae.W_dec.shape[0]
    for entry in indices:
        if not 0 <= entry < size:
            raise IndexError(f"no feature {entry} in an autoencoder of {size}; the last is {size - 1}")
    if not indices or len(set(indices)) != len(indices):
        raise ValueError(f"index={index!r}; name at least one feature, and none twice")
    return indices


@torch.no_grad()
def cut(sae: Autoencoder, indices: Sequence[int]) -> Slices:
    """Slices of an autoencoder, at least float32, on the CPU."""
    kind, cfg = architecture(sae), sae.cfg
    normalise = cfg.normalize_activations
    if normalise == "expected_average_only_in":
        # sae-lens itself applies none of it at run time: weights that were not folded would read the wrong scale
        raise ValueError(
            "this autoencoder expects scaled activations (normalize_activations='expected_average_only_in'); fold its "
            "scale in first: sae.fold_activation_norm_scaling_factor(factor)"
        )
    if normalise not in ("none", "constant_norm_rescale", "layer_norm"):
        raise ValueError(f"normalize_activations={normalise!r}; fold it into the weights with sae-lens first")
    if getattr(cfg, "reshape_activations", "none") == "hook_z":
        raise ValueError("an autoencoder on attention heads (hook_z) has no residual direction; take one on resid_post")

    def wide(tensor: Tensor) -> Tensor:
        return tensor.detach().cpu().to(torch.promote_types(tensor.dtype, torch.float32))

    rows = list(indices)
    sensor, decoder = wide(sae.W_enc[:, rows]).T, wide(sae.W_dec[rows])
    shift = sensor @ wide(sae.b_dec) if cfg.apply_b_dec_to_input else torch.zeros(len(rows)).to(sensor)
    # <w, x - mean(x)> = <w - mean(w), x>
    centred = sensor - sensor.mean(dim=-1, keepdim=True) if normalise == "layer_norm" else sensor
    if kind == "gated":
        gain = wide(sae.r_mag[rows]).exp()
        bias = wide(sae.b_mag[rows]) - gain * shift
        # gate and magnitude share the row: the gate opens at a pre-activation of its own
        threshold = wide(sae.b_mag[rows]) - gain * wide(sae.b_gate[rows])
        return Slices(centred * gain[:, None], bias, threshold.clamp(min=0), decoder, normalise)
    bias = wide(sae.b_enc[rows]) - shift
    threshold = wide(sae.threshold[rows]) if kind == "jumprelu" else torch.zeros_like(bias)
    if getattr(cfg, "rescale_acts_by_decoder_norm", False):
        norm = decoder.norm(dim=-1)
        centred, bias, decoder = centred * norm[:, None], bias * norm, decoder / norm[:, None]
    return Slices(centred.contiguous(), bias, threshold.clamp(min=0), decoder, normalise)


def site_of(sae: Autoencoder, site: Site | str | None) -> Site:
    """Where the autoencoder was trained: its metadata's hook name, or `site` if it has none.

    Raises:
        ValueError: no hook name and no site, a hook name that names no site, or a site that contradicts it.
    """
    given = Site.parse(site) if isinstance(site, str) else site
    name = getattr(sae.cfg.metadata, "hook_name", None)
    if name is None:
        if given is None:
            raise ValueError(
                "the autoencoder's metadata has no hook_name; pass the site where it was trained: site=Site(15)"
            )
        return given
    try:
        trained = _parse(name)
    except ValueError:
        if given is not None:
            return given
        raise ValueError(f"the autoencoder's hook_name {name!r} names no site of steerlens; pass site=...") from None
    if given is not None and given != trained:
        raise ValueError(f"the autoencoder was trained at {trained}, not at {given}; leave site out")
    return trained


def _parse(name: str) -> Site:
    """A hook name of TransformerLens, of its Bridge, or of Hugging Face, as sae-lens writes them."""
    head, _, tail = name.removeprefix("model.layers.").partition(".")
    if name.startswith("model.layers.") and head.isdigit() and not tail:
        return Site(int(head), "resid_post")
    stem, _, last = name.rpartition(".")
    known = {"hook_out": "hook_resid_post", "hook_in": "hook_resid_pre"}
    return Site.parse(f"{stem}.{known.get(last, last)}")


@dataclass(frozen=True)
class Origin:
    """What an autoencoder's metadata contains about the model it was trained on."""

    width: int
    folded: bool
    prepend_bos: bool | None

    @classmethod
    def of(cls, sae: Autoencoder) -> Origin:
        """From its metadata; sae-lens loads models with raw weights unless its metadata asks for other ones."""
        options = getattr(sae.cfg.metadata, "model_from_pretrained_kwargs", None) or {}
        folded = any(options.get(name) for name in ("fold_ln", "center_writing_weights"))
        return cls(sae.W_dec.shape[1], folded, getattr(sae.cfg.metadata, "prepend_bos", None))

    def check(self, host: Host, site: Site) -> None:
        """Whether the autoencoder fits a model.

        Raises:
            ValueError: another width, no such site, raw weights where folded ones are needed or the reverse.

        Warns:
            UserWarning: the model's library treats BOS otherwise than the training did.
        """
        host.check([site])
        if host.shape(site) != (self.width,):
            raise ValueError(
                f"the autoencoder has width {self.width}, {site} of this model has {list(host.shape(site))}; "
                "load the one for this model"
            )
        if host.processed != self.folded:
            if self.folded:
                words = "was trained on folded and centred weights; load the model as HookedTransformer.from_pretrained"
            else:
                words = (
                    "was trained on raw weights, and this model's are folded and centred, another residual basis; load "
                    "the model with HookedTransformer.from_pretrained_no_processing or TransformerBridge"
                )
            raise ValueError(f"the autoencoder {words}")
        if self.prepend_bos is not None and self.prepend_bos != host.prepends_bos:
            does, did = ("puts", "without") if host.prepends_bos else ("puts no", "with")
            warnings.warn(
                f"this model's library {does} BOS before a string, the autoencoder was trained {did} it; set "
                f"model.cfg.default_prepend_bos = {self.prepend_bos} or pass token ids",
                stacklevel=3,
            )
