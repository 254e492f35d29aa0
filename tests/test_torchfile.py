"""Files of torch.save hold tensors and plain values, or are refused before anything in them runs."""

from __future__ import annotations

import os
import struct

import pytest
import torch
from torch import nn

from steerlens.sharing import read_torch


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def doubled(times):
    """A list of two to this power of numbers, written as one list that holds the one before it twice."""
    held = [0.5]
    for _ in range(times):
        held = [held, held]
    return held


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ({"a": Evil()}, r"it holds a (posix|nt).mkdir, which is no tensor and no plain value"),
        (nn.Linear(2, 2), "it holds a torch.nn.modules.linear.Linear"),
        (torch.ones(2).to_sparse(), "it holds a torch._utils._rebuild_sparse_tensor"),
        ({"a": bytearray(4)}, "it holds a __builtin__.bytearray"),
        ({"a": {1, 2}}, "it holds a __builtin__.set"),
        ({"a": torch.ones(1).expand(10**9)}, "that the file has no place for"),
        (doubled(31), "it has more than 400000 values"),
    ],
)
def test_files_of_torch_that_hold_more_than_tensors_are_refused(held, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(held, "x.pt")
    with pytest.raises(ValueError, match=rf"^x.pt was not loaded: .*{words}"):
        read_torch("x.pt")
    assert not os.path.exists("evil")


def test_older_and_bare_pickles_are_refused(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pkl").write_bytes(b"cos\nmkdir\n(S'evil'\ntR.")
    for name in ("old.pt", "bare.pkl"):
        with pytest.raises(ValueError, match="a bare pickle is not read, because it can run any code"):
            read_torch(tmp_path / name)


def test_tensors_and_plain_values_are_read(tmp_path):
    held = {
        "a": torch.arange(3.0),
        1: [torch.ones(2, 3).bfloat16().t(), (None, True, 2**40, "x", 0.5)],
        "p": nn.Parameter(torch.ones(2)),
    }
    torch.save(held, tmp_path / "x.pt")
    found = read_torch(tmp_path / "x.pt")
    assert torch.equal(found["a"], held["a"])
    assert torch.equal(found[1][0], held[1][0])
    assert found[1][1] == held[1][1]
    assert torch.equal(found["p"], torch.ones(2))


def test_an_archive_with_an_impossible_offset_is_refused(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "x.pt")
    data = bytearray((tmp_path / "x.pt").read_bytes())
    # the offset of the table of contents in the 64-bit end record
    place = data.rindex(b"PK\x06\x06") + 48
    data[place : place + 8] = b"\xff" * 8
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(ValueError, match=r"x.pt was not loaded: "):
        read_torch(tmp_path / "x.pt")


def test_an_archive_whose_entries_are_the_same_bytes_is_refused(tmp_path):
    """4 MB that claim to be 80: each storage in the table of contents is made to lie where the first one does."""
    torch.save({index: torch.zeros(2**20 if index == 0 else 1) for index in range(20)}, tmp_path / "x.pt")
    data = bytearray((tmp_path / "x.pt").read_bytes())
    place, first = data.index(b"PK\x01\x02"), None
    while data[place : place + 4] == b"PK\x01\x02":
        name, extra, comment = struct.unpack_from("<HHH", data, place + 28)
        if data[place + 46 : place + 46 + name].rpartition(b"/")[0].endswith(b"data"):
            first = data[place + 16 : place + 28] + data[place + 42 : place + 46] if first is None else first
            data[place + 16 : place + 28], data[place + 42 : place + 46] = first[:12], first[12:]
        place += 46 + name + extra + comment
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(ValueError, match=r"x.pt was not loaded: its archive claims 8\d+ bytes in a file of 4\d+$"):
        read_torch(tmp_path / "x.pt")
