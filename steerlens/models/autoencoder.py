"""A small part of a sparse autoencoder trained on SmolLM2, shipped with steerlens."""

from __future__ import annotations

from importlib import resources
from typing import Any


def smollm2_sae() -> Any:
    """512 features of a sparse autoencoder on SmolLM2's residual stream after block 15, as a `sae_lens.SAE`.

    A slice of one with 3,072 features, which were trained by sae-lens on books in the public domain and on text that
    the model wrote itself: it reads and writes its features as the whole one does, but does not reconstruct the state.
    Recipe, licence and quality stand in `steerlens/data/sae/README.md`.

    Raises:
        ImportError: sae-lens is not installed.
    """
    try:
        from sae_lens import SAE
    except ImportError as error:
        raise ImportError("the autoencoder is loaded by sae-lens; pip install 'steerlens[sae]'") from error
    with resources.as_file(resources.files("steerlens") / "data" / "sae") as folder:
        return SAE.load_from_disk(folder)
