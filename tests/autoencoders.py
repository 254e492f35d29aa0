"""Random autoencoders of every architecture, made with sae-lens's own classes."""

from __future__ import annotations

import pytest
import torch

# What imports this file is skipped without sae-lens: a whole file of tests, or the one test that imports it.
sae_lens = pytest.importorskip("sae_lens")
from sae_lens.saes.sae import SAEMetadata  # noqa: E402

HOOK = "blocks.2.hook_resid_post"
IDS = [3, 17, 25, 29, 41, 22, 9]
TEXTS = [IDS, [4, 5, 6, 7, 8], [30, 31, 12]]

ARCHITECTURES = {
    "standard": ("StandardSAE", {}),
    "standard, no input bias": ("StandardSAE", {"apply_b_dec_to_input": False}),
    "standard, layer norm": ("StandardSAE", {"normalize_activations": "layer_norm"}),
    "standard, constant norm": ("StandardSAE", {"normalize_activations": "constant_norm_rescale"}),
    "jumprelu": ("JumpReLUSAE", {}),
    "gated": ("GatedSAE", {}),
    "topk": ("TopKSAE", {"k": 40}),
    "topk, scaled": ("TopKSAE", {"k": 40, "rescale_acts_by_decoder_norm": True}),
}


def autoencoder(kind="JumpReLUSAE", d=32, size=40, metadata=None, **options):
    """A random one of sae-lens, with every parameter away from its initial value."""
    generator = torch.Generator().manual_seed(0)
    if metadata is None:
        metadata = {"hook_name": HOOK, "prepend_bos": False}
    config = getattr(sae_lens, f"{kind}Config")(d_in=d, d_sae=size, metadata=SAEMetadata(**metadata), **options)
    sae = getattr(sae_lens, kind)(config)
    with torch.no_grad():
        rows = torch.randn(size, d, generator=generator)
        sae.W_dec.copy_(rows / rows.norm(dim=-1, keepdim=True) * torch.linspace(0.5, 2, size)[:, None])
        sae.W_enc.copy_(sae.W_dec.T + 0.1 * torch.randn(d, size, generator=generator))
        for name, parameter in sae.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
                if name == "threshold":
                    parameter.abs_()
    return sae
