"""What remote tests compare."""

from __future__ import annotations

import torch

IDS = torch.tensor([[3, 17, 25, 29, 41, 22, 9]])
OPTIONS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def clean(model):
    """Whether a client holds neither weights nor anything of a run that has ended."""
    return not model.dispatched and not model._edits and not {"generate", "_remote_backend"} & set(vars(model))


def same(record, expected, *, rounding=0.0):
    """Whether two records are equal to the last bit, or up to a share of their largest number.

    Before a block a server adds a control to what its first norm reads and once more to what attention puts out, where
    a local model adds it to the block's own input: the sums are rounded in another order.
    """
    return set(record) == set(expected) and all(
        torch.allclose(
            record[name].nan_to_num(), value.nan_to_num(), rtol=0, atol=rounding * float(value.nan_to_num().abs().max())
        )
        for name, value in expected.items()
    )
