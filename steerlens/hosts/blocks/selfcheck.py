"""Whether a model is what its roles say: a block adds what its two branches put out, and no token sees those behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from steerlens.core import Site
from steerlens.hosts.roles import ENDS, Layout

#: By model: what speaks against the points of a block, by its number.
_DOUBTS: WeakKeyDictionary[object, dict[int, str]] = WeakKeyDictionary()
#: A text of a few tokens, none of which is special in any vocabulary.
_TOKENS = (5, 11, 7, 23, 17, 29, 13)
#: Relative to the largest of the four states, by dtype; a sum of three numbers of eight bits is good to 1e-2.
_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

#: In the place of a block's number.
_EVERYWHERE = -1


def doubts_about(
    model: object,
    layouts: Sequence[Layout],
    sites: Sequence[Site],
    read: Callable[[Tensor, list[Site]], dict[Site, Tensor]],
    missing: Callable[[Site], str | None],
) -> str | None:
    """A sentence if `resid_pre + attn_out + mlp_out = resid_post` does not hold in a block of these sites, else None.

    Or if a state changes with a token behind it, which is asked of blocks that no table knows. Once per model, on a
    short text; for blocks that are known only if a site is no end of its block.

    Args:
        layouts: Of all blocks.
        read: Unsteered states of token ids `[1 pos]` at some sites.
        missing: As `Dimensions.missing`.
    """
    inner = [site for site in sites if site.point not in ENDS]
    if not inner and all(layout.known for layout in layouts):
        return None
    if model not in _DOUBTS:
        _DOUBTS[model] = _check_order(layouts, read) or _check(layouts, read, missing)
    found = _DOUBTS[model]
    if _EVERYWHERE in found:
        return found[_EVERYWHERE]
    return next((found[site.layer] for site in inner if site.layer in found), None)


def _check_order(layouts: Sequence[Layout], read: Callable[[Tensor, list[Site]], dict[Site, Tensor]]) -> dict[int, str]:
    if all(layout.known for layout in layouts):
        return {}
    last = Site(len(layouts) - 1, "resid_post")
    texts = (_TOKENS, (*_TOKENS[:-1], _TOKENS[0]))
    x, other = (read(torch.tensor([text]), [last])[last][:, :-1] for text in texts)
    off = float((x - other).float().norm(dim=-1).max()) / max(float(x.float().norm(dim=-1).max()), 1e-30)
    if off <= _TOLERANCES.get(x.dtype, 5e-2):
        return {}
    return {
        _EVERYWHERE: f"states of this model change by {off:.1e} of their size with a token behind them: it is "
        "bidirectional and cannot be steered, since pads and later tokens would be seen"
    }


def _check(
    layouts: Sequence[Layout],
    read: Callable[[Tensor, list[Site]], dict[Site, Tensor]],
    missing: Callable[[Site], str | None],
) -> dict[int, str]:
    points = ("resid_pre", "attn_out", "mlp_out", "resid_post")
    blocks = [
        [Site(layer, point) for point in points]
        for layer, layout in enumerate(layouts)
        if layout.unsummed is None and not any(missing(Site(layer, point)) for point in points)
    ]
    states = read(torch.tensor([_TOKENS]), [site for block in blocks for site in block]) if blocks else {}
    found = {}
    for block in blocks:
        if any(site not in states for site in block):
            continue  # a hook point that fires only for the library's own hooks
        pre, attn, mlp, post = (states[site] for site in block)
        largest = max(float(x.float().norm(dim=-1).max()) for x in (pre, attn, mlp, post))
        off = float((pre + attn + mlp - post).float().norm(dim=-1).max()) / max(largest, 1e-30)
        if off > _TOLERANCES.get(post.dtype, 5e-2):  # what is not finite is told elsewhere
            layer = block[0].layer
            found[layer] = (
                f"in block {layer}, a {layouts[layer].kind}, resid_pre + attn_out + mlp_out is off resid_post by "
                f"{off:.1e} of its size, so z, attn_out, resid_mid, mlp_post and mlp_out of it cannot be trusted; use "
                "resid_pre or resid_post, or name the modules with steerlens.roles(model, ...)"
            )
    return found
