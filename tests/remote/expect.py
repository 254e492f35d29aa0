"""What remote tests compare."""

from __future__ import annotations

import torch

IDS = torch.tensor([[3, 17, 25, 29, 41, 22, 9]])
OPTIONS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def clean(model):
    """Whether a client holds neither weights nor anything of a run that has ended."""
    return not model.dispatched and not model._edits and not {"generate", "_remote_backend"} & set(vars(model))


def same(record, expected):
    """Whether two records are equal to the last bit."""
    return set(record) == set(expected) and all(
        torch.equal(record[name].nan_to_num(), value.nan_to_num()) for name, value in expected.items()
    )
