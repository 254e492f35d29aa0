"""A model's blocks, linearised once and used for many controllers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from steerlens.contrast import Text, tokenize
from steerlens.fitting import resolve
from steerlens.hosts import Host


class Linearization:
    """Jacobians of all blocks at the last token of some texts, averaged over the texts.

    Attributes:
        jacobians: `A_t`, `[layer d d]`, `A[i, j] = d out_i / d in_j`, float32, on the CPU.
        model: Fingerprint of the model.
        n_texts: How many texts were averaged.
    """

    def __init__(self, jacobians: Tensor, model: dict[str, Any], n_texts: int):
        self.jacobians = jacobians
        self.model = model
        self.n_texts = n_texts

    def __len__(self) -> int:
        return self.jacobians.shape[0]

    def backwards(self) -> Iterator[tuple[int, Tensor]]:
        """`(t, A_t)` from the last block to the first."""
        for t in range(len(self) - 1, -1, -1):
            yield t, self.jacobians[t]

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file."""
        from safetensors.torch import save_file

        header = json.dumps({"model": self.model, "n_texts": self.n_texts})
        save_file({"jacobians": self.jacobians.contiguous()}, str(path), metadata={"steerlens.linearization": header})

    @classmethod
    def load(cls, path: str | Path) -> Linearization:
        """Read a file written by `save`.

        Raises:
            ValueError: the file holds no linearization.
        """
        from safetensors import safe_open

        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get("steerlens.linearization")
            if text is None:
                raise ValueError(f"{path} holds no linearization; linearize(model, texts).save(path) writes one")
            header = json.loads(text)
            return cls(file.get_tensor("jacobians"), header["model"], header["n_texts"])

    def __repr__(self) -> str:
        layers, d, _ = self.jacobians.shape
        return f"Linearization({layers} blocks of width {d}, mean of {self.n_texts} texts)"


def linearize(
    model: Any, texts: Sequence[Text], *, prepend_bos: bool | None = None, progress: bool = True
) -> Linearization:
    """Jacobians of every block for the last token of each text, averaged over the texts.

        A_t = mean_p  d f_t(x) / d x  at x = x_t(last token of p), the tokens before it held fixed

    Exact: reverse mode through one token against its KV cache, d cotangents a block and text, whatever its length.
    Kept whole, `[layer d d]` takes 4 T d^2 bytes (40 MB for T = 30, d = 576); `lqr` without a linearization keeps one
    layer at a time instead.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model.
        texts: Strings, tuples, messages or token ids, as in `Pairs`; each of at least 2 tokens.
        prepend_bos: As in `Pairs`.
        progress: Show a progress bar over the layers.

    Raises:
        ValueError: a text of fewer than 2 tokens.
    """
    host = resolve(model)
    tokens = [tokenize(text, host, prepend_bos)[0] for text in texts]
    jacobians = torch.empty(host.n_layers, host.d_model, host.d_model)
    for t, A in stream(host, tokens, progress=progress):
        jacobians[t] = A
    return Linearization(jacobians, host.fingerprint(), len(tokens))


def stream(host: Host, tokens: Sequence[Sequence[int]], *, progress: bool) -> Iterator[tuple[int, Tensor]]:
    """`(t, A_t)` from the last block to the first, one Jacobian in memory at a time, in the model's dtype or float32.

    Raises:
        ValueError: no text, or one of fewer than 2 tokens.
    """
    # checked here and not in the generator, so that the caller hears of it before any forward pass
    if not tokens or min(map(len, tokens)) < 2:
        raise ValueError("a text to linearise on needs at least 2 tokens: the last one, and a context")
    return _stream(host, tokens, progress)


def _stream(host: Host, tokens: Sequence[Sequence[int]], progress: bool) -> Iterator[tuple[int, Tensor]]:
    nominals = [host.nominal(text) for text in tokens]
    for t in tqdm(range(host.n_layers - 1, -1, -1), desc="linearising blocks", disable=not progress):
        yield t, sum(nominal.jacobian(t) for nominal in nominals) / len(nominals)  # type: ignore[misc]
