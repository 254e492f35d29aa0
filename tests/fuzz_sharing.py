"""Damages files of other programs and imports them: `python tests/fuzz_sharing.py 100000 [seed]`, or `make fuzz`.

Every GGUF file and every file of torch.save must be refused with a ValueError or be imported, in bounded time and
memory, without an import of a module and without running anything. Files of torch.save are damaged blindly and in
their list of instructions, which a forger writes as he likes.
"""

from __future__ import annotations

import io
import os
import random
import resource
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path

import torch
from fuzz_files import LONGEST_S, MOST_GROWTH, blind

import steerlens as sl
from steerlens.sharing import from_gguf, from_hidden_directions, from_lm_eval, read_torch, to_gguf, to_lm_eval

EVERY = slice(0, None)
SIZES = [0, 1, 2, 2**16, 2**31 - 1, 2**32, 2**53, 2**62, 2**64 - 1]
#: Instructions of a pickle that allocate, look up, call, or loop.
STEPS = [
    b"cos\nsystem\n(S'touch evil'\ntR",
    b"c__builtin__\nbytearray\n(J\xff\xff\xff\x7ftR",
    b"ctorch\nempty\n(J\xff\xff\xff\x7ftR",
    b"ctorch\nFloatStorage\n(J\xff\xff\xff\x7ftR",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ccollections\nOrderedDict\n",
    b"r\xff\xff\xff\xff",
    b"p4000000000\n",
    b"j\xff\xff\xff\x7f",
    b"X\xff\xff\xff\x7f",
    b"\x8a\xff",
    b"(" * 5000,
    b"]" * 5000,
    b"(l" * 3000,
    b"2" * 3000,
    b"t",
    b"R",
    b"Q",
    b".",
    b"u",
    b"J\xff\xff\xff\xff",
    b"K\x00",
    b"\x80\x05",
    b"b",
    b"\x81",
]


def samples(folder):
    """Files by kind, and how each is imported."""
    both = sl.add(torch.randn(16), layer=1, where=EVERY) + sl.project_out(torch.randn(16), layer=2, where=EVERY)
    to_lm_eval(both, folder / "lm.pt")
    to_gguf(sl.add(torch.randn(16), layer=[1, 2], where=EVERY), folder / "v.gguf")
    torch.save(torch.randn(4, 16).bfloat16(), folder / "direction.pt")
    torch.save({1: torch.randn(16), 2: [torch.randn(3, 4).t()]}, folder / "tensors.pt")
    readers = {
        "lm.pt": from_lm_eval,
        "v.gguf": from_gguf,
        "direction.pt": lambda path: from_hidden_directions(path, layers=1),
        "tensors.pt": read_torch,
    }
    return [(name, (folder / name).read_bytes(), read) for name, read in readers.items()]


def damaged_gguf(data, dice):
    """One number of the head replaced by another: counts, lengths, types, shapes, offsets."""
    data = bytearray(data)
    place = dice.choice([4, 8, 16, dice.randrange(24, len(data) - 8)])
    form = dice.choice(["<Q", "<I"])
    struct.pack_into(form, data, place, dice.choice(SIZES) & (2**64 - 1 if form == "<Q" else 2**32 - 1))
    return bytes(data)


def damaged_program(data, dice):
    """Another list of instructions in the same archive, or the archive compressed."""
    source = zipfile.ZipFile(io.BytesIO(data))
    target = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if dice.random() < 0.05 else zipfile.ZIP_STORED
    with zipfile.ZipFile(target, "w", kind) as archive:
        for name in source.namelist():
            held = source.read(name)
            if name.endswith("data.pkl"):
                held = bytearray(held)
                for _ in range(dice.choice([1, 1, 2, 5])):
                    place = dice.randrange(len(held))
                    if dice.random() < 0.6:
                        held[place:place] = dice.choice(STEPS)
                    else:
                        held = bytearray(blind(bytes(held), dice)) or bytearray(b".")
            elif dice.random() < 0.05:
                held = bytes(100) * dice.choice([0, 1, 10_000])
            archive.writestr(name, bytes(held))
    return target.getvalue()


def mutate(name, data, dice):
    if dice.random() < 0.3:
        return blind(data, dice)
    return damaged_gguf(data, dice) if name.endswith("gguf") else damaged_program(data, dice)


def fuzz(count: int, seed: int, folder: Path, *, report=None) -> Counter:
    """Damages and imports `count` files; raises AssertionError for one that is not refused as it should be."""
    files, path, seen, grown = samples(folder), folder / "damaged.pt", Counter(), 0
    before = os.getcwd()
    os.chdir(folder)
    for _, data, read in files:  # what a first call imports
        path.write_bytes(data)
        read(path)
    try:
        for number in range(count):
            dice = random.Random(f"{seed}.{number}")
            name, data, read = dice.choice(files)
            path.write_bytes(mutate(name, data, dice))
            modules, peak = set(sys.modules), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            what, begun = f"file {number} of seed {seed}, a damaged {name}", time.monotonic()
            try:
                read(path)
                seen["imported"] += 1
            except ValueError as error:
                if type(error) is not ValueError:
                    raise AssertionError(f"{what}: {error!r}") from error
                seen["refused"] += 1
            except Exception as error:
                raise AssertionError(f"{what}: {error!r}") from error
            taken = time.monotonic() - begun
            seen["slowest, ms"] = max(seen["slowest, ms"], round(taken * 1e3))
            grown += (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
            # codecs of the names in an archive, and what PyTorch needs to print a tensor in an error of its own
            known = ("encodings.", "torch.")
            imported = sorted(name for name in set(sys.modules) - modules if not name.startswith(known))
            assert not imported, f"{what}: reading imported {imported}"
            assert taken < LONGEST_S, f"{what} took {taken:.0f} s"
            assert not os.path.exists("evil"), f"{what} ran code"
            if report and (number + 1) % 1000 == 0:
                report(number + 1, seen)
    finally:
        os.chdir(before)
    assert grown < MOST_GROWTH, f"memory grew by {grown / 2**20:.0f} MB while files were read"
    seen["memory grew while reading by, MB"] = grown // 2**20
    return seen


if __name__ == "__main__":
    count, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        result = fuzz(count, seed, Path(name), report=lambda done, seen: print(done, dict(seen), flush=True))
    print(f"{count} imports, seed {seed}:", ", ".join(f"{key}: {value}" for key, value in sorted(result.items())))
