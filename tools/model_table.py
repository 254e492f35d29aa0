# ruff: noqa: E501 (rows of a table are one line each)
"""Write docs/models.md, and its copy in the package, from a run over the tiny models of tests/architectures.py.

    python tools/model_table.py            # in an environment with TransformerLens and nnsight

For each architecture and host: the points that the host offers in every block, those in some, and whether the blocks
can be linearised; `tests/test_roles.py` holds each of them against plain PyTorch hooks.
"""

from __future__ import annotations

import importlib.metadata
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[1]
PLACES = (HERE / "docs" / "models.md", HERE / "steerlens" / "data" / "models.md")
sys.path[:0] = [str(HERE), str(HERE / "tests")]

HEAD = """# Models: which points work where

Written by `tools/model_table.py` from tiny random models, with
{versions}.
What stands here is held against plain PyTorch hooks by `make test-models`: reading, writing, left-padded batches,
generation with and without a KV cache, and the Jacobians of the blocks (`lqr`) against differences of the whole model.
`resid_pre` and `resid_post`, and every method that needs no more, work on any list of blocks; the rest of an unknown
model is named with `steerlens.roles`. A point that is missing is refused by name when a method is fitted or attached.
Booting a multimodal TransformerBridge makes TransformerLens install torchvision into your environment, which may
replace your torch; nnsight needs none.

all: {all}. Points in parentheses exist in some blocks only.
The last column is nnsight's. On a TransformerBridge `lqr` is refused if the library's pass with a KV cache is not its
pass without one, with both numbers; with TransformerLens 3.9 that is so for models with ALiBi (MPT, some Falcon).

| architecture | TransformerBridge | nnsight | `lqr` |
| --- | --- | --- | --- |
"""

TAIL = """
## Adapters, fewer bits, weights kept elsewhere

| a model | is steered and fitted as | refused by name |
| --- | --- | --- |
| with an adapter of PEFT: LoRA, IA3 and their like, merged or not. nnsight takes the `PeftModel`, TransformerBridge the model inside, `peft_model.get_base_model()` | the model with the adapter in its weights: equal controllers, equal fingerprints | `cold_fd` until the adapter is merged; prompt and prefix tuning, whose virtual tokens shift positions |
| in 8 or 4 bits: bitsandbytes, PyTorch's dynamic int8 | itself; a controller of the full model of the same name attaches with a note | `cold_fd`, `tda`, `diagnose.direct`, which read or move the matrices; `lqr` on dynamic int8, whose pass with a KV cache is another one |
| some or all blocks offloaded by accelerate, or spread by a `device_map` | the plain model | `cold_fd` and `tda` where weights are offloaded; TransformerLens loads nothing that is on disk, nnsight runs nothing whose embedding is |

A fingerprint holds eight weights of the last block, with the adapter in them, and eight numbers of an adapter that is not merged. If only one
of two models has such an adapter and the eight weights agree, attaching notes it: whether it has been merged into the other cannot be seen.
`tests/test_adapters.py`, `tests/test_quantised.py` and `tests/test_offload.py` hold this on tiny models on the CPU; no GPU was used.

Bidirectional models are refused by what their attention says of itself (`is_causal`), and blocks that no table knows by a trial: a state that changes
with a token behind it.
"""


def main() -> None:
    """Write the page."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    from architectures import ARCHS
    from test_roles import IDS, REFUSED, logits_of, model_of, truth_of

    from steerlens.core import POINTS
    from steerlens.hosts import host_of

    def points(name: str, host: str) -> str:
        model = model_of(name, host)
        if isinstance(model, str):
            return "not tested (multimodal)" if "multimodal" in model else "the library does not load it"
        try:
            off = float((logits_of(model, IDS) - truth_of(name).run(IDS)).abs().max())
        except AttributeError:
            return "the library does not run it"
        if off > 1e-3:
            return "the library's own logits are off"
        return offered(host_of(model), POINTS)

    def linear(name: str) -> str:
        try:
            host_of(model_of(name, "nnsight")).nominal(IDS[0].tolist())
        except (NotImplementedError, RuntimeError) as error:
            return f"no: {str(error).split(',')[0]}"
        return "yes"

    packages = ("transformer-lens", "nnsight", "transformers", "torch")
    text = HEAD.format(
        versions=", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages), all=", ".join(POINTS)
    )
    for name in sorted(ARCHS):
        if name in REFUSED:
            text += f"| {name} | refused | refused: {REFUSED[name]} | |\n"
        else:
            text += f"| {name} | {points(name, 'bridge')} | {points(name, 'nnsight')} | {linear(name)} |\n"
    for place in PLACES:
        place.write_text(text + TAIL)


def offered(host: Any, everything: tuple[str, ...]) -> str:
    """The points of a host in words."""
    from steerlens.core import Site

    counts = {p: sum(host.missing(Site(layer, p)) is None for layer in range(host.n_layers)) for p in everything}
    if all(count == host.n_layers for count in counts.values()):
        return "all"
    return ", ".join(p if count == host.n_layers else f"({p})" for p, count in counts.items() if count)


if __name__ == "__main__":
    main()
