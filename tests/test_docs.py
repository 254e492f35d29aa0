"""README and pages: every Python snippet runs as printed, links and images lead somewhere, tables are not stale."""

from __future__ import annotations

import ast
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

import steerlens as sl
from steerlens import testing
from steerlens.core.signals import COMMON
from steerlens.fit.method import exported

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
START = ROOT / "docs" / "index.md"
FENCE = re.compile(r"^( *)(`{3,})(\w*)[^\n]*\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\s*$")
#: Folders of pages that are made of notebooks when the site is built.
MADE = ("tutorials/", "reproductions/")
#: Why a snippet may stand on a page and not be run. Nothing else is an excuse.
EXCUSES = ("needs a server", "needs a model from the hub", "a sketch of a file of its own")
#: Snippets that may be excused, all pages together.
MOST_EXCUSED = 12


def snippets(page):
    """The Python snippets of a page: line, source, why it is not run or None."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        if match[3] != "python":
            continue
        excuse = NOT_RUN.search(text[: match.start()])
        found.append((text.count("\n", 0, match.start()) + 2, match[4], excuse and excuse[1]))
    return found


def run(page, names):
    """Run a page's snippets one after the other, with the page's own line numbers in a traceback."""
    for line, source, excuse in snippets(page):
        if not excuse:
            exec(compile("\n" * (line - 1) + source, str(page), "exec"), names)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """What is defined at the end of Start, which the other pages go on from."""
    pytest.importorskip("transformer_lens")
    names: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("start"))
        run(START, names)
    return names


@pytest.mark.real_model
@pytest.mark.parametrize("page", [page for page in PAGES if page != START], ids=lambda page: page.name)
def test_the_snippets_of_a_page_run(page, started, tmp_path, monkeypatch):
    if not any(not excuse for _, _, excuse in snippets(page)):
        pytest.skip("no snippet")
    if page.name == "sae.md":  # sae-lens needs TransformerLens 3
        pytest.importorskip("sae_lens")
    monkeypatch.chdir(tmp_path)
    # README stands alone
    run(page, {} if page.name == "README.md" else dict(started))
    assert not sl.runs(started["model"])


def test_few_snippets_are_excused():
    excused = [(page.name, excuse) for page in PAGES for _, _, excuse in snippets(page) if excuse]
    assert all(excuse in EXCUSES for _, excuse in excused), excused
    assert len(excused) <= MOST_EXCUSED, excused


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_is_not_scrolled_sideways(page):
    if page.name in ("README.md", "index.md"):
        assert all(len(line) <= 80 for _, source, _ in snippets(page) for line in source.splitlines())
    else:
        assert all(len(line) <= 120 for _, source, _ in snippets(page) for line in source.splitlines())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_bar_is_escaped_in_code(page):
    """The site shows the backslash of `a \\| b`, which GitHub does not."""
    assert not re.findall(r"`[^`\n]*\\\|[^`\n]*`", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [*PAGES, *sorted(ROOT.glob("C*.md"))], ids=lambda page: page.name)
def test_links_and_images_lead_to_files(page):
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset|href)="([^"]+)"', text)
    for target in targets:
        file, _, anchor = target.partition("#")
        if re.match(r"\w+:", target) or (file.startswith(MADE) and page.parent.name == "docs"):
            continue  # elsewhere, or made when the site is built
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor and not anchor.startswith("only-"):
            assert anchor in anchors(path), f"{page.name} links to {target}; there are {sorted(anchors(path))}"


def anchors(page):
    """Anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    listed = set(re.findall(r"[\w/]+\.md", nav))
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert {page for page in pages if not page.startswith(MADE)} <= listed
    notebooks = [path for folder in MADE for path in (ROOT / folder).glob("*.ipynb")]
    made = {f"{path.parent.name}/{path.stem}.md" for path in notebooks} | {f"{folder}index.md" for folder in MADE}
    assert listed <= pages | made


def test_versions_are_those_of_the_package():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    page = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    for extra in ("lens", "nnsight", "sae"):
        for requirement in extras[extra]:
            assert f"`{requirement}`" in page, f"docs/versions.md does not have {requirement}"


def test_the_repository_has_one_address():
    """Notebooks take theirs from pyproject.toml, and GitHub's "Cite this repository" from CITATION.cff."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
    cited = re.search(r"^repository-code: *[\"']?([^\"'\s]+)", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert urls.get("Repository") == (cited and cited[1])


def test_messages_on_the_page_of_symptoms_are_those_of_the_code():
    known = []
    for path in (ROOT / "steerlens").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                known.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                known.append("".join(x.value if isinstance(x, ast.Constant) else "{}" for x in node.values))
    page = (ROOT / "docs" / "symptoms.md").read_text(encoding="utf-8").partition("## What a message means")[2]
    quoted = re.findall(r"^\| `([^`]+)`", page, re.MULTILINE)
    assert len(quoted) > 15
    for message in quoted:
        pieces = [piece.strip() for piece in message.split("...") if piece.strip()]
        assert any(all(piece in text for piece in pieces) for text in known), f"no message holds {message!r}"


def test_the_readme_has_what_was_measured():
    spec = importlib.util.spec_from_file_location("readme_measured", ROOT / "tools" / "readme_measured.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    written = (ROOT / "README.md").read_text(encoding="utf-8").split(tool.START)[1].split(tool.END)[0].strip()
    assert written == tool.short(), "the table is stale: run python tools/readme_measured.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_what_there_is(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"\b((?:tests|benchmarks|tools)/[\w/]+\.(?:py|md|sh))", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"`make ([\w-]+)", text):
        assert target in targets, f"{page.name} names make {target}"
    checks = " ".join(check.__name__ for check in testing.checks())
    for chosen in re.findall(r"test_conformance\.py -k \"?([\w ]+)", text):
        for word in re.split(" or | and ", chosen):
            known = word.strip() in checks or word.strip() in exported(sl.methods)
            assert known, f"{page.name} chooses {word}, which is in the name of no check and no method"


def test_defects_name_tests_that_there_are():
    page = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    shown = re.findall(r"`(test_\w+\.py) -k \"?([\w ]+)", page)
    assert len(shown) > 12
    for file, chosen in shown:
        names = re.findall(r"^def (test_\w+)", (ROOT / "tests" / file).read_text(encoding="utf-8"), re.MULTILINE)
        if file == "test_conformance.py":
            names += [f"{check.__name__} {name}" for check in testing.checks() for name in exported(sl.methods)]
        for alternative in chosen.split(" or "):
            words = alternative.split(" and ")
            assert any(all(word.strip() in name for word in words) for name in names), f"no test of {file} is {words}"


def test_concepts_lists_every_signal_of_the_library():
    page = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    page = page.partition("## Signals")[2].partition("## Units")[0]
    for name in signals():
        assert f"`{name}`" in page, f"docs/concepts.md does not explain the signal {name}"


def signals():
    """The signals that classes of the package declare, as tuples or by a property, and those that every loop has."""
    found = set(COMMON)
    for path in (ROOT / "steerlens").rglob("*.py"):
        if path.parent.name in ("diagnose", "testing", "fit"):  # their probes are not the user's
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "signals":
                found |= {entry.value for entry in getattr(node.value, "elts", [])}
            elif isinstance(node, ast.FunctionDef) and node.name == "signals":
                tuples = [part for part in ast.walk(node) if isinstance(part, ast.Tuple)]
                entries = [
                    entry for part in tuples for entry in part.elts if isinstance(getattr(entry, "value", None), str)
                ]
                found |= {entry.value for entry in entries}
    return found
