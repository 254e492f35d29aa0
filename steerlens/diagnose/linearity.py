"""Are the blocks locally linear, and do two texts see the same linear model?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from steerlens.control.linearization import Linearization
from steerlens.core.progress import bar
from steerlens.core.types import Figure, Frame
from steerlens.diagnose.result import curves, frame
from steerlens.diagnose.rollout import check_model, exact_dtype
from steerlens.fit.contrast import Text, tokenize
from steerlens.hosts import Nominal, host_of
from steerlens.hosts.types import Model


@dataclass(frozen=True)
class Linearity:
    """How well linear models of the blocks hold, by layer.

    Attributes:
        sizes: Sizes of the perturbations, as fractions of the state's norm.
        block: Relative error `|actual - predicted| / |actual|` of the change after one block when the state before it
            is perturbed, median over directions and texts, `[size layer]`, no unit.
        start: The block before which the perturbations of `path` are made.
        path: The same for every state after `start` when only the one before it is perturbed, `[size T-start]`; the
            first entry is the state after block `start`.
        similarity: Mean similarity of the texts' Jacobians over their pairs, `[layer]`, in [0, 1]; NaN for one text.
        baseline: Similarity of random directions, what unrelated Jacobians with equal gains would have.
    """

    sizes: tuple[float, ...]
    block: Tensor
    start: int
    path: Tensor
    similarity: Tensor
    baseline: float

    def table(self) -> Frame:
        """One row a block, a pandas DataFrame: `similarity`, and `block` and `path` errors for each size.

        The `path` error in row t is that of the state after block t.
        """
        columns: dict[str, Any] = {"layer": range(self.block.shape[1]), "similarity": self.similarity}
        blank = torch.full((self.start,), torch.nan, dtype=self.path.dtype)
        for row, size in enumerate(self.sizes):
            columns[f"block {size:g}"] = self.block[row]
            columns[f"path {size:g}"] = torch.cat([blank, self.path[row]])
        return frame(columns, "layer")

    def plot(self, kind: str = "path") -> Figure:
        """Relative error by layer, a line a size (`"path"` or `"block"`), or `"similarity"` with its baseline.

        Raises:
            ValueError: another kind.
        """
        layers = range(self.block.shape[1])
        if kind == "similarity":
            level = torch.full_like(self.similarity, self.baseline)
            return curves(
                {"between texts": (layers, self.similarity), "random": (layers, level)},
                title="Similarity of block Jacobians",
                x="layer",
                y="similarity (no unit)",
                dashed=("random",),
            )
        if kind == "block":
            xs, ys, title = layers, self.block, "Linear model of one block"
        elif kind == "path":
            xs, ys, title = layers[self.start :], self.path, f"Linear model of the blocks from {self.start} on"
        else:
            raise ValueError(f"kind={kind!r}; it is 'path', 'block' or 'similarity'")
        lines = {f"{size:g} of |x|": (xs, ys[row]) for row, size in enumerate(self.sizes)}
        return curves(lines, title=title, x="layer", y="relative error of the change after it (no unit)", log=True)


def linearity(
    model: Model,
    texts: Sequence[Text],
    *,
    sizes: Sequence[float] = (0.01, 0.03, 0.1, 0.3, 1.0),
    directions: int | Tensor = 8,
    start: int = 1,
    linearization: Linearization | None = None,
    seed: int = 0,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> Linearity:
    """Test the linear model of the blocks that feedback is designed on, at the last token of some texts.

    Directly: perturb a state by `d = size |x| v`, |v| = 1, send both through the blocks themselves, and compare

        one block:  f_t(x_t + d) - f_t(x_t)  with  A_t d,      path:  x'_s - x_s  with  A_{s-1} ... A_start d

    And by the similarity of two texts' Jacobians, whose k = d // 20 leading left singular vectors and values are U, S:

        similarity(A, A') = |(U S)' (U' S')|_* / (|S|_F |S'|_F),    |.|_* the sum of singular values

    The similarity is inflated between texts that end in the same token: the baseline, random unit vectors for U with
        equal S, is the value for unrelated ones.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model, with no controller attached.
        texts: Strings, tuples, messages or token ids, of at least 2 tokens; two at least for a similarity.
        sizes: Norms of the perturbations as fractions of the state's.
        directions: How many random directions, or directions `[n d]`, as the gains of a controller.
        start: The block before which the path's perturbation is made. Before block 0 is the embedding, which is small.
        linearization: Test this linear model, averaged over other texts, instead of each text's own Jacobians.
        seed: Of the random directions and of the baseline.
        prepend_bos: As in `Pairs`.
        progress: Show a progress bar over the layers.

    Raises:
        ValueError: no text, sizes that are not positive, a block the model does not have, a linearization of another
            model, directions of another width.

    Source: the alignment measure of A-LQR (arXiv 2604.19018); the direct test is ours.
    """
    host = host_of(model)
    _check(texts, sizes, start, host.n_layers)
    if linearization is not None:
        check_model(host, linearization)
    nominals = [host.nominal(tokenize(text, host, prepend_bos)[0]) for text in texts]
    generator = torch.Generator().manual_seed(seed)
    v = _directions(directions, host.d_model, generator).to(nominals[0].states[0])
    tests = [_Test(nominal, v, sizes, start, exact_dtype(host)) for nominal in nominals]
    similarity = []
    for t in bar(range(host.n_layers), desc="testing blocks", progress=progress):
        plants = [] if linearization is None else [linearization.jacobians[t].to(v.device, exact_dtype(host))]
        if linearization is None or len(nominals) > 1:
            own = [nominal.jacobian(t).to(exact_dtype(host)) for nominal in nominals]
            similarity.append(_mean_similarity(own))
        for index, test in enumerate(tests):
            test.step(t, plants[0] if plants else own[index])
    return Linearity(
        sizes=tuple(float(size) for size in sizes),
        block=_median([test.block for test in tests]),
        start=start,
        path=_median([test.path for test in tests]),
        similarity=torch.tensor(similarity or [torch.nan] * host.n_layers, dtype=torch.float64),
        baseline=_baseline(host.d_model, generator),
    )


class _Test:
    """Perturbed states of one text on their way, and the relative errors so far, each `[size direction]`."""

    def __init__(self, nominal: Nominal, v: Tensor, sizes: Sequence[float], start: int, dtype: torch.dtype):
        self.nominal, self.start, self.dtype = nominal, start, dtype
        self.pushes = torch.tensor(sizes).to(v)[:, None, None] * v
        self.block: list[Tensor] = []
        self.path: list[Tensor] = []

    def step(self, t: int, A: Tensor) -> None:
        """Go through block t, whose linear model is A."""
        x = self.nominal.states[t]
        push = self.pushes * x.norm()
        self.block.append(self._compare(self._send(t, x + push), push.to(self.dtype) @ A.T, t))
        if t < self.start:
            return
        if t == self.start:
            self.state, self.predicted = x + push, push.to(self.dtype)
        self.state, self.predicted = self._send(t, self.state), self.predicted @ A.T
        self.path.append(self._compare(self.state, self.predicted, t))

    def _send(self, t: int, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.nominal.blocks[t](x.flatten(0, -2)).view_as(x)

    def _compare(self, state: Tensor, predicted: Tensor, t: int) -> Tensor:
        actual = state.to(self.dtype) - self.nominal.states[t + 1].to(self.dtype)
        return ((actual - predicted).norm(dim=-1) / actual.norm(dim=-1)).cpu()


def similarity(A: Tensor, B: Tensor) -> float:
    """Alignment of the leading outputs of two Jacobians A and B, `[d d]` each, in [0, 1]; see `linearity`."""
    return _alignment(_leading(A), _leading(B))


def _leading(A: Tensor) -> Tensor:
    """`U S` of the d // 20 largest singular values (one at least), `[d k]`."""
    k = max(1, A.shape[0] // 20)
    values, vectors = torch.linalg.eigh(A @ A.T)
    return vectors[:, -k:] * values[-k:].clamp(min=0).sqrt()


def _alignment(W: Tensor, X: Tensor) -> float:
    overlap = torch.linalg.matrix_norm(W.T @ X, ord="nuc")
    return float(overlap / (W.norm() * X.norm()))


def _mean_similarity(jacobians: Sequence[Tensor]) -> float:
    leading = [_leading(A) for A in jacobians] if len(jacobians) > 1 else []
    pairs = [_alignment(W, X) for i, W in enumerate(leading) for X in leading[:i]]
    return sum(pairs) / len(pairs) if pairs else float("nan")


def _baseline(d: int, generator: torch.Generator, draws: int = 8) -> float:
    k = max(1, d // 20)
    total = 0.0
    for _ in range(draws):
        W, X = torch.randn(2, d, k, generator=generator, dtype=torch.float64)
        total += _alignment(W / W.norm(dim=0), X / X.norm(dim=0))
    return total / draws


def _directions(given: int | Tensor, d: int, generator: torch.Generator) -> Tensor:
    v = torch.randn(given, d, generator=generator) if isinstance(given, int) else given
    if v.ndim != 2 or v.shape[1] != d or not len(v):
        raise ValueError(f"directions have shape {list(v.shape)}; they are [n {d}] for this model, n at least 1")
    return v / v.norm(dim=1, keepdim=True)


def _median(errors: Sequence[Sequence[Tensor]]) -> Tensor:
    """Over directions and texts: `[text][layer][size direction] -> [size layer]`."""
    stacked = torch.stack([torch.stack(list(layers)) for layers in errors])
    return rearrange(stacked, "text layer size direction -> size layer (text direction)").median(dim=-1).values


def _check(texts: Sequence[Text], sizes: Sequence[float], start: int, n_layers: int) -> None:
    if isinstance(texts, str) or not len(texts):
        raise ValueError(f"texts={texts!r}; give a list of at least one text")
    if not len(sizes) or not all(0 < size < float("inf") for size in sizes):
        raise ValueError(f"sizes={sizes!r}; they are positive fractions of the state's norm")
    if not 0 <= start < n_layers:
        raise ValueError(f"start={start}; the model has blocks 0 to {n_layers - 1}")
