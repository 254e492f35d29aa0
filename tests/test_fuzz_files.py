"""Two thousand damaged files, of which nothing but a ValueError may come; `make fuzz` tries a hundred thousand."""

from __future__ import annotations

import pytest

pytest.importorskip("resource")

from fuzz_files import fuzz


def test_damaged_files_are_refused_or_hold_what_was_saved(tmp_path):
    seen = fuzz(2000, 0, tmp_path)
    assert seen["refused"] > 1000
    assert seen["loaded, as it was saved"] > 10
    assert seen["of these steered"] > 10


def test_the_fuzzer_sees_a_file_that_is_loaded_with_other_values(tmp_path, monkeypatch):
    """With the check of the digest off, it must complain."""
    from steerlens.core import tensorfile

    monkeypatch.setattr(tensorfile, "digest", lambda text, tensors: "the same for all")
    with pytest.raises(AssertionError, match="is not what was saved"):
        fuzz(200, 0, tmp_path)


def test_damaged_files_of_other_programs_are_refused_or_imported(tmp_path):
    from fuzz_sharing import fuzz as fuzz_imports

    seen = fuzz_imports(2000, 0, tmp_path)
    assert seen["refused"] > 1000
    assert seen["imported"] > 10
