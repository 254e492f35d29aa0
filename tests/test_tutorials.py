"""The notebooks as they are committed: current, with pictures, links that lead somewhere and public names only.

`make tutorials` executes them.
"""

import ast
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the notebooks are read with nbformat, in the extra dev")
jupytext = pytest.importorskip("jupytext", reason="the sources are read with jupytext, in the extra dev")

FOLDER = Path(__file__).parent.parent / "tutorials"
sys.path.insert(0, str(FOLDER))
try:
    import dress
    from build import stale
    from dress import SOURCES, TUTORIALS, dressed
    from rules import broken_in_notebook, broken_in_source, hidden_names, wide
finally:
    sys.path.remove(str(FOLDER))


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_notebook_is_current_and_whole(source):
    target = source.with_suffix(".ipynb")
    assert not broken_in_source(source)
    assert not stale(dressed(jupytext.read(source), source), target)
    assert not broken_in_notebook(target)


def test_every_notebook_has_a_source_and_is_listed():
    for folder in (FOLDER, FOLDER.parent / "reproductions"):
        listed = (folder / "README.md").read_text()
        for notebook in folder.glob("*.ipynb"):
            assert notebook.with_suffix(".py") in SOURCES
            assert f"({notebook.name})" in listed
    assert [int(source.stem[:2]) for source in TUTORIALS] == list(range(1, len(TUTORIALS) + 1))


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("from steerlens.hosts import host_of", "imports steerlens.hosts"),
        ("import steerlens.core.passing", "imports steerlens.core.passing"),
        ("from steerlens.models import _load", "the private _load"),
        ("model._model", "uses the private ._model"),
        ("from clerk import pairs", "imports clerk"),
    ],
)
def test_what_is_not_public_is_found(code, words):
    assert words in hidden_names(ast.parse(code), {"clerk"})[0]


def test_a_wide_line_of_code_is_found():
    cells = [nbformat.v4.new_code_cell("x" * 81 + "\n" + "x" * 80), nbformat.v4.new_markdown_cell("x" * 100)]
    assert len(wide(cells)) == 1


def test_a_missing_picture_and_a_broken_link_are_found(tmp_path):
    figure = nbformat.v4.new_output("display_data", {"application/vnd.plotly.v1+json": {"data": [], "layout": {}}})
    cells = [nbformat.v4.new_markdown_cell("[there](nowhere.ipynb)"), nbformat.v4.new_code_cell("1", outputs=[figure])]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    found = broken_in_notebook(tmp_path / "a.ipynb")
    assert len(found) == 2
    assert any("without a picture" in line for line in found)
    assert any("nowhere.ipynb" in line for line in found)


@pytest.mark.parametrize("address", ["https://github.com/a-b/c.d", "https://github.com/a-b/c.d.git", None])
def test_badge_and_installation_follow_the_address_of_the_repository(address, tmp_path, monkeypatch):
    url = f'Repository = "{address}"' if address else 'Other = "https://github.com/somebody/else"'
    (tmp_path / "pyproject.toml").write_text(f"[project]\nname = 'x'\n[project.urls]\n{url}\n")
    monkeypatch.setattr(dress, "ROOT", tmp_path)
    for source in SOURCES:
        notebook = dressed(jupytext.read(source), source)
        install = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
        if address is None:
            assert "colab" not in notebook.cells[0].source
            assert '"..[demo' in install
            continue
        place = f"colab.research.google.com/github/a-b/c.d/blob/main/{source.parent.name}/{source.stem}.ipynb)"
        # a file beside the notebook is not there in Colab
        assert (place in notebook.cells[0].source) == ("from clerk import" not in source.read_text())
        assert '] @ git+https://github.com/a-b/c.d"' in install
        packages = {"nnsight": "nnsight", "smollm2_sae": "sae"}
        for name, extra in packages.items():
            assert (extra in install.partition("[")[2].partition("]")[0].split(",")) == (name in source.read_text())


def test_an_address_that_colab_cannot_open_is_refused(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text("[project.urls]\nRepository = 'https://example.org/a/b'\n")
    monkeypatch.setattr(dress, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=r"Colab opens https://github\.com/owner/name"):
        dress.repository()
