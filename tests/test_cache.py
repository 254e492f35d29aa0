"""The folder of converted models."""

from __future__ import annotations

import os

import pytest

from steerlens.models.cache import making, seal, verify


def model_in(folder):
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors").write_bytes(b"w" * (17 * 2**20))
    seal(folder)
    return folder


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json was changed"),
        (
            lambda folder: os.truncate(folder / "model.safetensors", 100),
            "safetensors has 100 bytes, not 17825792",
        ),
        (lambda folder: (folder / "steerlens.json").write_text("nonsense"), "steerlens.json cannot be read"),
        (lambda folder: (folder / "steerlens.json").write_text("[3]"), "steerlens.json cannot be read"),
    ],
)
def test_a_damaged_model_is_named(tmp_path, damage, words):
    folder = model_in(tmp_path / "model")
    verify(folder)
    damage(folder)
    with pytest.raises(OSError, match=f"the converted model in {folder} is damaged: .*{words}"):
        verify(folder)


def test_a_model_of_an_older_version_has_no_manifest(tmp_path):
    folder = model_in(tmp_path / "model")
    (folder / "steerlens.json").unlink()
    verify(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(OSError, match=r"tokenizer.json is missing"):
        verify(folder)


def test_what_killed_processes_left_is_removed(tmp_path):
    old, new = tmp_path / "partial-old", tmp_path / "partial-new"
    for folder in (old, new):
        (folder / "model").mkdir(parents=True)
    os.utime(old, (0, 0))
    with making(tmp_path) as work:
        assert not old.exists()
        assert new.exists()
        assert work.parent == tmp_path
    assert not work.exists()


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"the cache folder .*file/cache cannot be written .* set STEERLENS_CACHE"):
        making(tmp_path / "file" / "cache").__enter__()
