"""Controllers, linearizations and records as files: what was saved is what is loaded, and all else is refused."""

from __future__ import annotations

import contextlib
import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import steerlens as sl
from steerlens.control.linearization import Linearization
from steerlens.core import tensors_of
from steerlens.core.registry import fields_of, fits, registry
from steerlens.core.tensorfile import read, write

OLD = sorted((Path(__file__).parent / "data" / "format2").glob("*.safetensors"))
SITE = sl.Site(1)


def add(size=4, **options):
    return sl.Controller([sl.Loop(sl.Add(torch.arange(1.0, size + 1)), SITE, **options)], {"method": "mine"})


def edited(path, change):
    """Rewrite a file with its header changed and a digest that fits: what a forger can do."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["steerlens"])
    header = change(header) or header
    del header["format"]
    write(path, header, load_file(path))


def test_safetensors_itself_reads_what_is_written(tmp_path):
    tensors = {
        "a": torch.arange(6, dtype=torch.float16).view(2, 3),
        "b": torch.tensor([True, False, True]),
        "c": torch.tensor(2.5, dtype=torch.bfloat16),
        "d": torch.empty(0, 3),
        "e": torch.arange(3),
        "f": torch.randn(5, dtype=torch.float64)[::2],
    }
    write(tmp_path / "x", {"kind": "test"}, tensors)
    found, (header, own) = load_file(tmp_path / "x"), read(tmp_path / "x", "test")
    assert header == {"format": 3, "kind": "test"}
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
        assert torch.equal(own[name], tensor)
        assert own[name].dtype == tensor.dtype


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.stem)
def test_files_of_format_2_are_read_and_written_anew(path, tmp_path):
    kind = Linearization if path.stem == "linearization" else sl.Controller
    old = kind.load(path)
    old.save(tmp_path / "new")
    new = kind.load(tmp_path / "new")
    with safe_open(path, "pt") as file:
        count = len(list(file.keys()))
    if kind is Linearization:
        assert torch.equal(new.jacobians, old.jacobians)
        assert torch.equal(new.states, old.states)
        assert (new.model, new.n_texts) == (old.model, old.n_texts)
        return
    pairs = list(zip(*(tensors_of([loop.parts for loop in each.loops]) for each in (old, new)), strict=True))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)
    assert len({id(a) for a, _ in pairs}) == count
    assert new.recipe == old.recipe
    assert [(loop.act, loop.sense, loop.where, loop.strength) for loop in new.loops] == [
        (loop.act, loop.sense, loop.where, loop.strength) for loop in old.loops
    ]


def test_classes_are_named_without_their_modules(tmp_path):
    add().save(tmp_path / "c")
    with safe_open(tmp_path / "c", "pt") as file:
        header = json.loads(file.metadata()["steerlens"])
    assert header["loops"][0]["law"]["class"] == "Add"
    assert "steerlens.laws" not in json.dumps(header)


def test_a_class_whose_module_moved_is_found(tmp_path, monkeypatch):
    add().save(tmp_path / "c")
    monkeypatch.setattr(sl.Add, "__module__", "steerlens.elsewhere")
    assert torch.equal(sl.Controller.load(tmp_path / "c").loops[0].law.vector, torch.arange(1.0, 5))


def test_the_parts_of_steerlens_have_different_names():
    assert {"Add", "Feedback", "Gate", "Level", "Feature", "Flow"} <= set(registry())


def refused_or_loaded(path):
    with contextlib.suppress(ValueError):
        return sl.Controller.load(path)
    with pytest.raises(ValueError, match="was not loaded") as caught:
        sl.Controller.load(path)
    assert type(caught.value) is ValueError
    return None


def test_every_flipped_bit_is_refused_or_harmless(tmp_path):
    """Each bit of a small file; blanks between header and tensors are the only harmless place."""
    path = tmp_path / "c"
    controller = add()
    controller.save(path)
    whole = path.read_bytes()
    loaded = 0
    for position in range(8 * len(whole)):
        broken = bytearray(whole)
        broken[position // 8] ^= 1 << position % 8
        path.write_bytes(broken)
        found = refused_or_loaded(path)
        if found is None:
            continue
        loaded += 1
        assert torch.equal(found.loops[0].law.vector, controller.loops[0].law.vector)
        assert repr(found.loops) == repr(controller.loops)
        assert found.recipe == controller.recipe
    assert loaded < 30


@pytest.mark.parametrize("cut", [0, 5, 9, 100, 400, -1])
def test_a_cut_file_is_refused(tmp_path, cut):
    add().save(tmp_path / "c")
    (tmp_path / "c").write_bytes((tmp_path / "c").read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"was not loaded: its? "):
        sl.Controller.load(tmp_path / "c")


def test_a_missing_file_is_no_damaged_one(tmp_path):
    for load in (sl.Controller.load, sl.Linearization.load, sl.Record.load):
        with pytest.raises(FileNotFoundError):
            load(tmp_path / "nothing")
        with pytest.raises(OSError):  # noqa: PT011 (the kind depends on the system)
            load(tmp_path)


def set_law(**state):
    return lambda header: header["loops"][0]["law"]["state"].update(state)


def set_loop(**state):
    return lambda header: header["loops"][0].update(state)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_loop(strength="1_0"), "loops.0 has no legal strength"),
        (set_loop(strength=True), "loops.0 has no legal strength"),
        (set_loop(strength=1e39), r"strength=1e\+39"),
        (set_loop(group=None), "loops.0 has no legal group"),
        (set_loop(law="Add"), "loops.0 has no legal law"),
        (set_loop(act=[]), "loops.0 has no legal act"),
        (set_loop(act={"site": "blocks.²5.hook_resid_post"}), "names no site"),
        (set_loop(where={"slice": ["a", "b"]}), "whose bounds are no whole numbers"),
        (set_loop(where={"tensor": "loops.0.law.vector"}), "a mask is bool"),
        (set_loop(name="a.b"), "has letters, digits and underscores"),
        (set_loop(color="red"), "loops.0 has no legal color"),
        (set_law(size=2.0), "has 'size', which Add does not declare"),
        (set_law(__class__="Gate"), "has '__class__', which Add does not declare"),
        (set_law(act=1.0), "has 'act', which Add does not declare"),
        (set_law(vector=2.0), "loops.0.law.vector is 2.0, it should be Tensor"),
        (set_law(vector={"tensor": "other"}), "names a tensor that the file does not hold"),
        (set_law(vector=[{"tensor": "loops.0.law.vector"}] * 2000), "for the 65th time"),
        (set_loop(law={"class": "Turn2", "state": {}}), "is a Turn2, which this steerlens lacks"),
        (set_loop(law={"class": "Law", "state": {}}), "is a Law, which this steerlens lacks"),
        (set_loop(law={"class": "steerlens.hosts.remote.Add", "state": {}}), "which this steerlens lacks"),
        (set_loop(law={"class": "Add", "state": {}}), "loops.0.law lacks vector, which every Add has"),
        (set_loop(law={"class": "Side", "state": {}}), "loops.0.law lacks direction, threshold"),
        (lambda header: header.pop("loops"), "no list of loops"),
        (lambda header: header.update(recipe=[]), "no recipe"),
        (lambda header: header["recipe"].update(model=3), "is no fingerprint"),
        (lambda header: header["recipe"].update(method={"a": 1}), "its recipe's method is no text"),
        (lambda header: header["recipe"].update(arguments=[1]), "its recipe's arguments are no object"),
        (lambda header: header["recipe"].update(found="x"), "its recipe's found are no object"),
        (lambda header: header["recipe"].update(steerlens=3), "its recipe's steerlens is no text"),
        (lambda header: header["recipe"].update(model={"name": ["a"]}), "its model's name is no text"),
        (lambda header: header["recipe"].update(model={"n_layers": "4"}), "its model's n_layers is no whole number"),
        (lambda header: header["recipe"].update(method="\ud800"), "its header holds half a character"),
        (lambda header: header["recipe"].update(model={"probe": ["a"] * 8}), "no list of eight numbers"),
        (lambda header: header.update(loops=[]), "'loops.0.law.vector' belongs to no loop"),
        (lambda header: header.update(kind="record"), "it holds a 'record', no controller"),
    ],
)
def test_a_forged_header_is_refused(tmp_path, change, words):
    path = tmp_path / "c"
    add().save(path)
    edited(path, lambda header: change(header) and None)
    with pytest.raises(ValueError, match=words) as caught:
        sl.Controller.load(path)
    assert type(caught.value) is ValueError
    assert str(caught.value).startswith(f"{path} was not loaded: ")


def raw(path, table, data=b""):
    head = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (b"[" * 200_000, "nested too deeply"),
        (b"\xff\xfe{}", "no UTF-8"),
        (b"[1, 2]", "no JSON object"),
        (b"{nonsense", "is no JSON"),
        (b'{"a": NaN}', "the number NaN"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "the number 1000"),
        ({}, "has no steerlens header"),
        ({"__metadata__": {"steerlens": 3}}, "its metadata are not strings"),
        ({"__metadata__": {"steerlens": "[" * 100_000}}, "its header is nested too deeply"),
        ({"__metadata__": {"steerlens": "[]"}}, "its header is no JSON object"),
        ({"__metadata__": {"steerlens": '{"format": 4}'}}, "has format 4, this version of steerlens reads formats 2"),
        ({"a": 1}, "has no steerlens header"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path, table, words):
    raw(tmp_path / "c", table)
    with pytest.raises(ValueError, match=words):
        sl.Controller.load(tmp_path / "c")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "does not fill its place"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "does not fill its place"),
        ({"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}, "illegal shape"),
        ({"dtype": "F32", "shape": [2**49], "data_offsets": [0, 4]}, "illegal shape"),
        ({"dtype": "F32", "shape": [0, 2**40], "data_offsets": [0, 0]}, "the file has 4 for them"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "illegal shape"),
        ({"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}, "illegal shape"),
        ({"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}, "illegal shape"),
        ({"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}, "unknown dtype"),
        ({"dtype": "C64", "shape": [1], "data_offsets": [0, 4]}, "unknown dtype 'C64'"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0]}, "illegal data_offsets"),
        ({"dtype": "BOOL", "shape": [4], "data_offsets": [0, 4]}, "neither true nor false"),
        ([], "is not described by"),
    ],
)
def test_an_illegal_tensor_is_refused_before_it_is_allocated(tmp_path, entry, words):
    raw(tmp_path / "c", {"__metadata__": {"steerlens": '{"format": 2}'}, "t": entry}, b"\x02\x02\x02\x02")
    with pytest.raises(ValueError, match=words):
        sl.Controller.load(tmp_path / "c")


@pytest.mark.parametrize("again", [{}, {"steerlens": "{}"}])
def test_a_name_twice_in_a_table_is_refused(tmp_path, again):
    """Readers differ in which of the two they take; a digest says nothing of the other."""
    add().save(tmp_path / "c")
    data = (tmp_path / "c").read_bytes()
    size = int.from_bytes(data[:8], "little")
    table = b'{"__metadata__":' + json.dumps(again).encode() + b"," + data[9 : 8 + size]
    (tmp_path / "c").write_bytes(len(table).to_bytes(8, "little") + table + data[8 + size :])
    with pytest.raises(ValueError, match="its table of contents has a name twice"):
        sl.Controller.load(tmp_path / "c")


def test_steps_without_end_are_refused(tmp_path):
    edited_path = tmp_path / "c"
    sl.Controller.load(next(path for path in OLD if path.stem == "odesteer")).save(edited_path)
    edited(edited_path, lambda header: header["loops"][0]["law"]["state"].update(steps=10**9))
    with pytest.raises(ValueError, match="steps=1000000000; it is a number from 1 to 1000"):
        sl.Controller.load(edited_path)


def test_nothing_is_imported_for_a_file(tmp_path):
    add().save(tmp_path / "c")
    edited(tmp_path / "c", set_loop(law={"class": "steerlens.cli.__main__.app", "state": {}}))
    code = (
        "import sys, steerlens as sl\nbefore = set(sys.modules)\n"
        f"try:\n    sl.Controller.load({str(tmp_path / 'c')!r})\nexcept ValueError:\n    pass\n"
        "print(sorted(name for name in set(sys.modules) - before if not name.startswith('steerlens.core')))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout
    assert not [name for name in eval(out) if name.split(".")[0] in ("nnsight", "typer", "steerlens")]


class Clipped(sl.Law):
    """A law of a user's: it declares its attributes by assigning them."""

    def __init__(self, gain: float, goal: torch.Tensor, names: list[str], floor: float | None = None):
        self.gain, self.goal, self.names, self.floor = gain, goal, names, floor

    def act(self, x, now):
        return (self.gain * (self.goal - x)).clamp(min=self.floor), {}


def test_a_law_of_the_users_own_is_saved_and_checked(tmp_path):
    path = tmp_path / "c"
    law = Clipped(0.5, torch.ones(4), ["a"], -1.0)
    sl.Controller([sl.Loop(law, SITE)]).save(path)
    with pytest.raises(ValueError, match=r"is a Clipped, which this steerlens lacks; pass your own classes as laws="):
        sl.Controller.load(path)
    found = sl.Controller.load(path, laws=[Clipped]).loops[0].law
    assert (found.gain, found.names, found.floor) == (0.5, ["a"], -1.0)
    edited(path, set_law(gain="0.5"))
    with pytest.raises(ValueError, match=r"loops.0.law.gain is '0.5', it should be float"):
        sl.Controller.load(path, laws=[Clipped])
    edited(path, set_law(gain=1, names=[1]))
    with pytest.raises(ValueError, match=r"names is \[1\], it should be list\[str\]"):
        sl.Controller.load(path, laws=[Clipped])
    with pytest.raises(TypeError, match="give your own subclasses of Law"):
        sl.Controller.load(path, laws=["Clipped"])


def test_an_attribute_that_no_class_declares_is_named_when_it_is_saved(tmp_path):
    law = sl.Add(torch.ones(4))
    law.note = 3
    with pytest.raises(ValueError, match=r"loops.0.law has note, which Add does not declare; it declares .*vector"):
        sl.Controller([sl.Loop(law, SITE)]).save(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_two_classes_of_one_name_are_refused(tmp_path):
    def make():
        class Add(sl.Law):
            def act(self, x, now):
                return x, {}

        return Add

    twin = make()
    with pytest.raises(ValueError, match="of a second class called Add; a file needs one name for each"):
        sl.Controller([sl.Loop(twin(), SITE)]).save(tmp_path / "c")
    with pytest.raises(ValueError, match="have one name, and a file names classes by their names: rename yours"):
        registry([twin])


@pytest.mark.parametrize(
    ("value", "hint", "legal"),
    [
        (1, float, True),
        (True, float, False),
        (True, int, False),
        (None, float | None, True),
        ((1, "a"), tuple[int, str], True),
        ((1, 2), tuple[int, str], False),
        ([1, 2], tuple[int, ...], True),
        ("ab", list[str], False),
    ],
)
def test_types_are_read_strictly(value, hint, legal):
    assert fits(value, hint) is legal


def test_fields_of_a_part_with_a_property():
    assert "basis" not in fields_of(sl.Point)
    assert set(fields_of(sl.Level)) >= {"basis", "level"}


def test_a_recipe_that_json_cannot_hold_is_named(tmp_path):
    controller = sl.Controller(add().loops, {"method": "mine", "data": {1, 2}})
    with pytest.raises(TypeError, match="the recipe holds what JSON does not"):
        controller.save(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []
