"""Damages files in many ways and loads them: `python tests/fuzz_files.py 100000 [seed]`, or `make fuzz`.

Each file is damaged blindly (flipped bits, cuts, bytes put in), in its table of contents, or in its header; a forger
also makes the digest anew. Every file must be refused with a ValueError or be loaded, in bounded time and memory and
without an import. A file whose digest was not made anew must hold what was saved if it is loaded, and a forged
controller that is loaded must be refused or steer when it is attached.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

import steerlens as sl
from steerlens.control.linearization import Linearization
from steerlens.core import tensors_of
from steerlens.core.registry import registry
from steerlens.core.tensorfile import DIGEST, HEADER
from steerlens.models import tiny

OLD = Path(__file__).parent / "data" / "format2"
LONGEST_S = 20.0
#: Of the process's largest memory while files are loaded, in bytes, over all of them; they have 200 kB to some MB.
MOST_GROWTH = 200 * 2**20
WORDS = ["", "x", "1_0", "last", "all", "a.b", "__class__", "signals", "steerlens.cli.Add", "\ud800", "blocks.1.hook_z"]
NUMBERS = [0, 1, -1, 3, 2**31, 2**53, 10**9, 10**30, 0.5, -1e-300, 1e39, 1e308, float("nan"), float("inf")]


class Sample:
    """One file: its bytes, how to read it, and what it holds."""

    def __init__(self, path, kind):
        self.name, self.kind, self.data = path.stem, kind, path.read_bytes()
        self.checked = b"steerlens.digest" in self.data
        self.holds = essence(kind.load(path))


def samples(folder: Path) -> list[Sample]:
    """Files of format 2 and 3: controllers of every method, a linearization and a record."""
    found = []
    for path in sorted(OLD.glob("*.safetensors")):
        kind = Linearization if path.stem == "linearization" else sl.Controller
        if path.stat().st_size < 40_000:
            found.append(Sample(path, kind))
        kind.load(path).save(folder / path.name)
        found.append(Sample(folder / path.name, kind))
    model = tiny("llama", host="bridge")
    with sl.steer(model, sl.Controller.load(OLD / "lqr.safetensors"), record="all", trust=True) as run:
        model(torch.tensor([[1, 2, 3]]))
        run.record.save(folder / "record")
    return [*found, Sample(folder / "record", sl.Record)]


def essence(thing):
    """What has to be the same after loading: plain values and bytes."""
    if isinstance(thing, sl.Controller):
        loops = [(repr(loop), loop.name, loop.group, repr(loop.where)) for loop in thing.loops]
        tensors = tensors_of([loop.parts for loop in thing.loops])
    elif isinstance(thing, Linearization):
        loops, tensors = [thing.model, thing.n_texts], [thing.jacobians, thing.states]
    else:
        loops, tensors = sorted(thing), [thing[name] for name in sorted(thing)]
    return repr(loops), [(tensor.dtype, tensor.shape, hashlib.sha256(memory(tensor)).digest()) for tensor in tensors]


def memory(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def split(data):
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(table, body):
    head = json.dumps(table).encode()
    return len(head).to_bytes(8, "little") + head + body


def forged_digest(text, table, body):
    """The digest as documented in docs/security.md, written here independently."""
    dtypes = {"F32": "float32", "F64": "float64", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool", "I64": "int64"}
    hashed = hashlib.sha256(text.encode(errors="surrogatepass"))
    for name, entry in sorted(table.items()):
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            hashed.update(json.dumps([name, f"torch.{dtypes[entry['dtype']]}", entry["shape"]]).encode())
            hashed.update(body[begin:end])
    return f"sha256:{hashed.hexdigest()}"


def blind(data, dice):
    """Flipped bits, bytes set, put in or taken out, a cut."""
    data = bytearray(data)
    for _ in range(dice.choice([1, 1, 2, 8])):
        place = dice.randrange(min(len(data), dice.choice([16, 2000, len(data)])) or 1)
        action = dice.randrange(6)
        if action < 3 and data:
            data[place] ^= 1 << dice.randrange(8)
        elif action == 3 and data:
            data[place] = dice.choice(b'\x00\xff"{}[],:0-eE.')
        elif action == 4:
            data[place:place] = bytes(dice.randrange(256) for _ in range(dice.choice([1, 8, 100])))
        else:
            del data[place : place + dice.choice([1, 8, 100, len(data)])]
    return bytes(data)


def nodes(tree, path=()):
    """Where the entries of a JSON tree are, down to some depth."""
    yield path
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, entry in children if len(path) < 20 else ():
        yield from nodes(entry, (*path, key))


def at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def anything(tree, paths, dice):
    """A value to put somewhere."""
    kind = dice.randrange(12)
    if kind == 0:
        return dice.choice([None, True, False, [], {}, [[]], {"": {}}])
    if kind < 3:
        return dice.choice(WORDS)
    if kind < 5:
        return dice.choice(NUMBERS)
    if kind == 5:
        deep = {}
        for _ in range(dice.choice([5, 40, 150])):
            deep = dice.choice([[deep], {"tuple": [deep]}, {"list": [deep]}])
        return deep
    if kind == 6:
        return {"slice": [dice.choice([None, -3, 2**70, "a", 1.5]), dice.choice([None, 5, [], -1])]}
    if kind == 7:
        return {"class": dice.choice(sorted(registry())), "state": {}}
    other = copy.deepcopy(at(tree, dice.choice(paths)))
    many = 3000 if len(json.dumps(other)) < 2000 else 3
    return [other] * dice.choice([1, 2, many]) if kind == 8 else other


def damaged(tree, dice):
    """A JSON tree with a few nodes replaced, renamed, added or removed."""
    tree = copy.deepcopy(tree)
    for _ in range(dice.choice([1, 1, 1, 2, 4])):
        paths = list(nodes(tree))
        *way, last = dice.choice(paths[1:]) if len(paths) > 1 else [None]
        if last is None:
            return tree
        parent, action = at(tree, way), dice.randrange(8)
        if action == 0 and isinstance(parent, dict):
            parent[dice.choice([*WORDS, *map(str, parent)])] = parent.pop(last)
        elif action == 1:
            del parent[last]
        elif action == 2 and isinstance(parent, dict):
            parent[dice.choice(WORDS)] = anything(tree, paths, dice)
        elif action == 3 and isinstance(parent[last], (int, float)):
            parent[last] = dice.choice(NUMBERS)
        else:
            parent[last] = anything(tree, paths, dice)
    return tree


def mutate(sample, dice):
    """Bytes of a damaged file, and whether its digest was made anew."""
    kind = dice.randrange(4)
    if kind == 0:
        return blind(sample.data, dice), False
    table, body = split(sample.data)
    if kind == 1:
        return join(damaged(table, dice), body), False
    if kind == 2 and len(body):
        place = dice.randrange(len(body))
        body = body[:place] + bytes([body[place] ^ 1 << dice.randrange(8)]) + body[place + 1 :]
    metadata = table["__metadata__"]
    key = next(name for name in metadata if name != DIGEST)
    header = json.loads(metadata[key])
    metadata[key] = json.dumps(damaged(header, dice) if kind == 3 else header)
    if sample.checked and HEADER in metadata and dice.random() < 0.8:
        metadata[DIGEST] = forged_digest(metadata[HEADER], table, body)
        return join(table, body), True
    return join(table, body), not sample.checked


def fuzz(count: int, seed: int, folder: Path, *, report=None) -> Counter:
    """Damages and loads `count` files; raises AssertionError for one that is not refused as it should be."""
    files, model, ids = samples(folder), tiny("llama", host="bridge"), torch.tensor([[3, 17, 25]])
    path, seen = folder / "damaged", Counter()
    sl.steer(model, sl.Controller.load(OLD / "caa.safetensors"), trust=True).remove()
    grown = 0
    for number in range(count):
        dice = random.Random(f"{seed}.{number}")
        sample = dice.choice(files)
        data, forged = mutate(sample, dice)
        path.write_bytes(data)
        modules, peak = set(sys.modules), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        what, begun = f"file {number} of seed {seed}, a damaged {sample.name}", time.monotonic()
        try:
            try:
                loaded = sample.kind.load(path)
            finally:
                grown += (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
                imported = sorted(set(sys.modules) - modules)
                assert not imported, f"{what}: loading imported {imported}"
                seen["slowest to load, ms"] = max(seen["slowest to load, ms"], round((time.monotonic() - begun) * 1e3))
        except ValueError as error:
            documented = type(error) is ValueError and str(error).startswith(f"{path} was not loaded: ")
            _need(documented, f"{what}: {error!r}")
            seen["refused"] += 1
        except Exception as error:
            raise AssertionError(f"{what}: {error!r}") from error
        else:
            same = essence(loaded) == sample.holds
            # format 2 has no digest
            assert same or forged or not sample.checked, f"{what} was loaded, and is not what was saved"
            seen["loaded, as it was saved" if same else "loaded, with other values"] += 1
            if isinstance(loaded, sl.Controller):
                assert loaded.nbytes <= len(data), f"{what} holds more than the file"
                if not same:
                    seen[attached(model, loaded, ids, what)] += 1
        taken = time.monotonic() - begun
        assert taken < LONGEST_S, f"{what} took {taken:.0f} s"
        if report and (number + 1) % 1000 == 0:
            report(number + 1, seen)
    assert grown < MOST_GROWTH, f"memory grew by {grown / 2**20:.0f} MB while files were loaded"
    seen["memory grew while loading by, MB"] = grown // 2**20
    return seen


def _need(fact, what):
    if not fact:
        raise AssertionError(what)


def attached(model, controller, ids, what):
    """Attaches a forged controller and runs the model once."""
    try:
        with sl.steer(model, controller, trust=True):
            model(ids)
    except (ValueError, NotImplementedError):
        return "of these refused when attached or run"
    except Exception as error:
        raise AssertionError(f"{what}, attached: {error!r}") from error
    return "of these steered"


if __name__ == "__main__":
    count, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        result = fuzz(count, seed, Path(name), report=lambda done, seen: print(done, dict(seen), flush=True))
    print(f"{count} files, seed {seed}:", ", ".join(f"{key}: {value}" for key, value in sorted(result.items())))
