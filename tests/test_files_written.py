"""Writing files as a whole, what linearizations, records and sums keep in them, and numbers that are refused."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest
import torch

import steerlens as sl
from steerlens.control.linearization import Linearization
from steerlens.core import tensors_of
from steerlens.core.files import MOST_NAMED
from steerlens.core.tensorfile import write
from steerlens.models import tiny

SITE = sl.Site(1)


def add(size=4, **options):
    return sl.Controller([sl.Loop(sl.Add(torch.arange(1.0, size + 1)), SITE, **options)], {"method": "mine"})


class TestWriting:
    """One helper for all savers."""

    def test_the_umask_decides_the_mode(self, tmp_path):
        for mask in (0o022, 0o077, 0o002):
            before = os.umask(mask)
            try:
                add().save(tmp_path / "c")
            finally:
                os.umask(before)
            assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o666 & ~mask

    def test_a_link_stays_a_link(self, tmp_path):
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real" / "c")
        for strength in (1.0, 2.0):
            add(strength=strength).save(tmp_path / "link")
            assert (tmp_path / "link").is_symlink()
            assert sl.Controller.load(tmp_path / "real" / "c").loops[0].strength == strength

    def test_a_missing_folder_and_a_folder_of_that_name(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            add().save(tmp_path / "no" / "c")
        with pytest.raises(OSError, match="is no regular file"):
            add().save(tmp_path)

    def test_a_full_disk_leaves_the_older_file(self, tmp_path):
        resource = pytest.importorskip("resource")
        path = tmp_path / "c"
        add().save(path)
        before = path.read_bytes()
        code = (
            "import resource, signal, torch, steerlens as sl\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, (4096, {resource.RLIM_INFINITY}))\n"
            "law = sl.Add(torch.ones(10_000))\n"
            f"try:\n    sl.Controller([sl.Loop(law, sl.Site(1))]).save({str(path)!r})\n"
            "except OSError:\n    print('refused')"
        )
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
        assert out.stdout.strip() == "refused"
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    def test_what_a_killed_process_left_goes_with_the_next_save(self, tmp_path):
        old, new, other = (tmp_path / name for name in (".c.1a2b.part", ".c.3c4d.part", ".d.1a2b.part"))
        for path in (old, new, other):
            path.write_bytes(b"half")
        for path in (old, other):
            os.utime(path, (0, 0))
        add().save(tmp_path / "c")
        assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "c", new, other])

    def test_an_interrupt_leaves_nothing(self, tmp_path, monkeypatch):
        def interrupt(*args):
            raise KeyboardInterrupt

        add().save(tmp_path / "c")
        before = (tmp_path / "c").read_bytes()
        monkeypatch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            add(strength=3.0).save(tmp_path / "c")
        assert [path.name for path in tmp_path.iterdir()] == ["c"]
        assert (tmp_path / "c").read_bytes() == before


def test_a_loaded_linearization_does_not_depend_on_its_file(tmp_path):
    plant = Linearization(torch.randn(3, 4, 4), torch.randn(4, 4), {"n_layers": 3}, 2)
    plant.save(tmp_path / "l")
    loaded = Linearization.load(tmp_path / "l")
    with open(tmp_path / "l", "r+b") as file:
        file.seek(0)
        file.write(b"\0" * (tmp_path / "l").stat().st_size)
        file.truncate(10)
    assert torch.equal(loaded.jacobians, plant.jacobians)
    assert torch.equal(loaded.states, plant.states)
    with pytest.raises(ValueError, match="was not loaded"):
        Linearization.load(tmp_path / "l")


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"jacobians": torch.zeros(3, 4, 4)}, r"it should hold jacobians and states"),
        ({"jacobians": torch.zeros(3, 4, 4), "states": torch.zeros(3, 4)}, r"not \[layer d d\] and \[layer\+1 d\]"),
        ({"jacobians": torch.zeros(()), "states": torch.zeros(())}, r"not \[layer d d\] and \[layer\+1 d\]"),
        (
            {"jacobians": torch.zeros(3, 4, 4, dtype=torch.long), "states": torch.zeros(4, 4)},
            "not floating-point numbers",
        ),
    ],
)
def test_a_linearization_of_wrong_tensors_is_refused(tmp_path, tensors, words):
    write(tmp_path / "l", {"kind": "linearization", "model": {}, "n_texts": 1}, tensors)
    with pytest.raises(ValueError, match=words):
        Linearization.load(tmp_path / "l")


def test_a_record_is_saved_and_loaded(tmp_path):
    model = tiny("llama", host="bridge")
    controller = sl.Controller([sl.Loop(sl.Add(torch.ones(32)), SITE)])
    with sl.steer(model, controller, record="all") as run:
        model(torch.tensor([[1, 2, 3]]))
        run.record.save(tmp_path / "r")
        found = sl.Record.load(tmp_path / "r")
        assert set(found) == set(run.record)
        for name in found:
            torch.testing.assert_close(found[name], run.record[name], equal_nan=True, rtol=0, atol=0)
        with pytest.raises(ValueError, match="it holds a 'record', no controller"):
            sl.Controller.load(tmp_path / "r")
    with sl.steer(model, controller, where=slice(7, 9)) as run:
        model(torch.tensor([[1, 2, 3]]))
        run.record.save(tmp_path / "r")
        assert set(sl.Record.load(tmp_path / "r")) == set(run.record)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"0.hook_steer_error": torch.ones(1, 3), "1.hook_steer_error": torch.ones(1, 4)}, "not of one sequence"),
        ({"0.hook_steer_error": torch.ones(3)}, r"no signal \[batch pos"),
    ],
)
def test_a_record_that_is_none_is_refused(tmp_path, tensors, words):
    write(tmp_path / "r", {"kind": "record"}, {f"blocks.{name}": value for name, value in tensors.items()})
    with pytest.raises(ValueError, match=f"r was not loaded: .*{words}"):
        sl.Record.load(tmp_path / "r")


def test_a_sum_keeps_the_models_of_its_summands(tmp_path):
    model = tiny("llama", host="bridge")
    pairs = sl.Pairs([[1, 2, 3]], [[4, 5, 6]])
    here, elsewhere = sl.caa(model, pairs), sl.caa(tiny("llama", host="bridge", seed=1), pairs)
    for both in (here + elsewhere, elsewhere + here, here + (here + elsewhere) * 2):
        both.save(tmp_path / "c")
        for controller in (both, sl.Controller.load(tmp_path / "c")):
            with pytest.raises(ValueError, match="this caa was fitted on another model: the weights differ"):
                sl.steer(model, controller)
            sl.steer(model, controller, trust=True).remove()
    sl.steer(model, here + here).remove()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda: sl.Add(torch.full((32,), torch.nan)), r"the Add at blocks.1.hook_resid_post.vector holds nan"),
        (lambda: sl.Add(torch.full((32,), torch.inf)), "holds inf; the numbers of a controller must be finite"),
        (lambda: sl.Add(torch.full((32,), 1e39, dtype=torch.float64)), r"holds 1e\+39"),
        (lambda: sl.Feedback(sl.Level(torch.ones(32), float("nan")), torch.ones(1, 32)), "setpoint.level holds nan"),
    ],
)
def test_numbers_that_are_not_finite_are_refused_when_attached(change, words):
    with pytest.raises(ValueError, match=words):
        sl.steer(tiny("llama", host="bridge"), sl.Controller([sl.Loop(change(), SITE)]))


@pytest.mark.parametrize(("strength", "kind"), [("2", TypeError), (float("nan"), ValueError)])
def test_a_strength_is_a_finite_number(strength, kind):
    with pytest.raises(kind, match="strength="):
        add(strength=strength)


def test_names_of_loops_are_legal_and_made_unique():
    with pytest.raises(ValueError, match="has letters, digits and underscores"):
        add(name="a.b")
    controller = add(32, name="a") + add(32, name="a") + add(32, name="a2")
    with sl.steer(tiny("llama", host="bridge"), controller) as run:
        (names,) = run.signals.values()
        assert len({table["u"] for table in names.own}) == 3


def test_one_loop_may_name_a_tensor_several_times(tmp_path):
    direction = torch.nn.functional.normalize(torch.randn(4), dim=0)
    level = sl.Level(direction, 1.0)
    controller = sl.Controller([sl.Loop(sl.Feedback(level, level.basis), sl.Site(layer)) for layer in range(80)])
    controller.save(tmp_path / "c")
    loaded = sl.Controller.load(tmp_path / "c")
    assert len({id(tensor) for tensor in tensors_of([loop.parts for loop in loaded.loops])}) == 2
    assert MOST_NAMED > 10
