"""A model's blocks, linearised once and used for many controllers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from steerlens.core.tensorfile import check_fingerprint, read, write
from steerlens.core.types import Json
from steerlens.fit.contrast import Text, tokenize
from steerlens.hosts import Dimensions, Host, host_of
from steerlens.hosts.blocks.nominal import Nominal
from steerlens.hosts.types import Model

Item = TypeVar("Item")


class Plant:
    """Abstract: the blocks as a linear system around the last token of some texts, `x[t+1] = r[t+1] + A_t (x - r[t])`.

    Jacobians and states are means over the texts; a product of Jacobians is the product of the means.

    Attributes:
        states: r, the mean unsteered path of the last token, `[layer+1 d]`; the last is before the final norm.
        n_texts: How many texts were averaged.
    """

    states: Tensor
    n_texts: int

    def __len__(self) -> int:
        return self.states.shape[0] - 1

    @property
    def dtype(self) -> torch.dtype:
        """Of the Jacobians: float32, or the model's wider dtype."""
        raise NotImplementedError

    def jacobian(self, t: int) -> Tensor:
        """`A_t`, `[d d]`, `A[i, j] = d out_i / d in_j`."""
        raise NotImplementedError

    def pull(self, t: int, rows: Tensor) -> Tensor:
        """`rows @ A_t`, gradients through one block, `[k d] -> [k d]`, in the dtype of `rows`."""
        raise NotImplementedError

    def push(self, t: int, rows: Tensor) -> Tensor:
        """`rows @ A_t'`, tangents through one block, `[k d] -> [k d]`, in the dtype of `rows`."""
        raise NotImplementedError


class Linearization(Plant):
    """Jacobians of all blocks at the last token of some texts, averaged over the texts.

    Attributes:
        jacobians: `A_t`, `[layer d d]`, `A[i, j] = d out_i / d in_j`, float32, on the CPU.
        states: Mean unsteered path of the last token, `[layer+1 d]`, float32, on the CPU.
        model: Fingerprint of the model.
        n_texts: How many texts were averaged.
    """

    def __init__(self, jacobians: Tensor, states: Tensor, model: Json, n_texts: int):
        self.jacobians = jacobians
        self.states = states
        self.model = model
        self.n_texts = n_texts

    @property
    def dtype(self) -> torch.dtype:
        """float32."""
        return self.jacobians.dtype

    def jacobian(self, t: int) -> Tensor:
        """`A_t`, `[d d]`."""
        return self.jacobians[t]

    def pull(self, t: int, rows: Tensor) -> Tensor:
        """`rows @ A_t`"""
        return rows @ self.jacobians[t].to(rows)

    def push(self, t: int, rows: Tensor) -> Tensor:
        """`rows @ A_t'`"""
        return rows @ self.jacobians[t].to(rows).T

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file; an older one is replaced when the new one is complete.

        Raises:
            OSError: it cannot be written there.
        """
        header = {"kind": "linearization", "model": self.model, "n_texts": self.n_texts}
        write(path, header, {"jacobians": self.jacobians, "states": self.states})

    @classmethod
    def load(cls, path: str | Path) -> Linearization:
        """Read a file written by `save`, as a whole: later changes of the file do not matter.

        Raises:
            OSError: there is no such file, or it cannot be read.
            ValueError: it holds no linearization, or was damaged.
        """
        try:
            header, tensors = read(path, "linearization")
            model, n_texts = header.get("model"), header.get("n_texts")
            if not isinstance(model, dict) or not isinstance(n_texts, int) or n_texts < 1:
                raise ValueError("its header names no model, or no number of texts")
            check_fingerprint(model)
            if set(tensors) != {"jacobians", "states"}:
                raise ValueError(f"it holds the tensors {sorted(tensors)}, it should hold jacobians and states")
            jacobians, states = tensors["jacobians"], tensors["states"]
            layers, d = jacobians.shape[0] if jacobians.ndim else 0, states.shape[-1] if states.ndim else 0
            if jacobians.shape != (layers, d, d) or states.shape != (layers + 1, d) or not layers:
                shapes = f"{list(jacobians.shape)} and {list(states.shape)}"
                raise ValueError(f"jacobians and states have shapes {shapes}, not [layer d d] and [layer+1 d]")
            if not (jacobians.is_floating_point() and states.is_floating_point()):
                raise ValueError(
                    f"jacobians are {jacobians.dtype} and states {states.dtype}, not floating-point numbers"
                )
        except ValueError as error:
            raise ValueError(f"{path} was not loaded: {error}") from None
        return cls(jacobians, states, model, n_texts)

    def __repr__(self) -> str:
        layers, d, _ = self.jacobians.shape
        return f"Linearization({layers} blocks of width {d}, mean of {self.n_texts} texts)"


def linearize(
    model: Model, texts: Sequence[Text], *, prepend_bos: bool | None = None, progress: bool = True
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
        ValueError: a text of fewer than 2 tokens, or a state that is not finite.
    """
    host = host_of(model)
    plant = Blocks(host, [tokenize(text, host, prepend_bos)[0] for text in texts])
    jacobians = torch.empty(host.n_layers, host.d_model, host.d_model)
    for t in backwards(plant, progress=progress):
        jacobians[t] = plant.jacobian(t)
    return Linearization(jacobians, plant.states.float().cpu(), host.fingerprint(), plant.n_texts)


class Blocks(Plant):
    """The model's own blocks as a plant: nothing is kept but states and caches, every product runs a block again.

    It can be sent to a server that trusts its users.

    Args:
        host: Of the model, or the anatomy of an nnsight model that has its weights.
        tokens: Token ids of the texts to linearise on. The model runs on them when the plant is first used.

    Raises:
        ValueError: no text, or one of fewer than 2 tokens.
    """

    def __init__(self, host: Dimensions, tokens: Sequence[Sequence[int]]):
        check_texts(tokens)
        self.n_texts = len(tokens)
        self._host, self._tokens = host, tokens
        self._nominals: list[Nominal] = []
        self._states: Tensor | None = None

    @property
    def nominals(self) -> list[Nominal]:
        """One for each text.

        Raises:
            ValueError: a state is not finite.
        """
        if self._nominals:
            return self._nominals
        found = [self._host.nominal(text) for text in self._tokens]
        for nominal in found:
            for t, state in enumerate(nominal.states):
                if not state.isfinite().all():
                    raise ValueError(
                        f"the state before block {t} is not finite on a text to linearise on; are the weights, and is "
                        f"the model's dtype {self._host.dtype} wide enough?"
                    )
        self._nominals = found
        return found

    @property
    def states(self) -> Tensor:  # type: ignore[override]
        """Mean path of the last token, `[layer+1 d]`, in float32 or the model's wider dtype."""
        if self._states is None:
            self._states = _mean(torch.stack(nominal.states).to(self.dtype) for nominal in self.nominals)
        return self._states

    def __len__(self) -> int:
        return self._host.n_layers

    @property
    def dtype(self) -> torch.dtype:
        """float32, or the model's wider dtype."""
        return torch.promote_types(self._host.dtype, torch.float32)

    def jacobian(self, t: int) -> Tensor:
        """`A_t`, `[d d]`: d gradients through one token and text, added up in one matrix."""
        total = torch.zeros(self._host.d_model, self._host.d_model, dtype=self.dtype, device=self._host.device)
        for nominal in self.nominals:
            nominal.add_jacobian(t, total)
        return total.div_(self.n_texts)

    def pull(self, t: int, rows: Tensor) -> Tensor:
        """`rows @ A_t`, by reverse mode."""
        return _mean(nominal.pull(t, rows).to(rows) for nominal in self.nominals)

    def push(self, t: int, rows: Tensor) -> Tensor:
        """`rows @ A_t'`, by differentiating reverse mode."""
        return _mean(nominal.push(t, rows).to(rows) for nominal in self.nominals)


def backwards(plant: Plant, *, progress: bool, first: int = 0) -> Iterator[int]:
    """Blocks from the last one to `first`, under a progress bar."""
    yield from over(range(len(plant) - 1, first - 1, -1), "linearising blocks", progress)


def over(items: Sequence[Item], what: str, progress: bool) -> Iterable[Item]:
    """The items, under a progress bar if one is asked for."""
    if not progress:
        return items
    # not at the top: on a server, which shows no bar, this function runs without steerlens
    from steerlens.core.progress import bar

    return bar(items, desc=what)


def check_texts(tokens: Sequence[Sequence[int]]) -> None:
    """Raises ValueError, before any forward pass, for texts that cannot be linearised on."""
    if not tokens or min(map(len, tokens)) < 2:
        raise ValueError("a text to linearise on needs at least 2 tokens: the last one, and a context")


def check_plant(host: Host, linearization: Linearization) -> None:
    """Raises ValueError for a linearization of another model, or one that is not finite."""
    differences = host.differences(linearization.model)
    if differences:
        raise ValueError(f"the linearization is of another model: {'; '.join(differences)}")
    broken = [t for t, A in enumerate(linearization.jacobians) if not A.isfinite().all()]
    if broken:
        raise ValueError(f"the linearization is not finite at blocks {broken}")


def _mean(terms: Iterable[Tensor]) -> Tensor:
    total, count = None, 0
    for term in terms:
        total, count = term if total is None else total.add_(term), count + 1
    assert total is not None
    return total.div_(count)
