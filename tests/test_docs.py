"""What the documents say of the code is so: files, classes, methods and headings that they name exist."""

import ast
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from functools import cache

import pytest
from documented import PAGES
from test_layers import HEIGHT, ROOT, sources

ARCHITECTURE = ROOT / "docs" / "architecture.md"
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
DRAWING = ROOT / "docs" / "architecture.svg"
DOCUMENTS = PAGES

_FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
_PATH = re.compile(r"(?<![\w/.])(?:gemini|chunk|lazy|tests|docs|scripts)/[\w/-]+\.(?:py|md|svg|cpp)\b")
_FOLDER = re.compile(r"(?:gemini|chunk|lazy|tests|docs|scripts)/(?:[\w-]+/)*")
_CLASS = re.compile(r"(?:[A-Z][a-z0-9]+){2,}|[A-Z][a-z]+(?=\.[a-z_]+$)")
"""Names of two words, and those before a method; others may be torch's or plain English."""


def broken_links(path_in_root: str, text: str) -> list[str]:
    """Links to files and headings that do not exist."""
    folder = (ROOT / path_in_root).parent
    found = []
    for link in _LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, heading = link.partition("#")
        target = folder / file if file else ROOT / path_in_root
        if not target.exists():
            found.append(link)
        elif heading and heading not in _anchors(text if not file else target.read_text()):
            found.append(link)
    return found


def missing_paths(text: str) -> list[str]:
    """Paths of files and folders, in words or in code, that do not exist."""
    folders = [code for code in _CODE.findall(text) if _FOLDER.fullmatch(code)]
    return [path for path in (*_PATH.findall(text), *folders) if not (ROOT / path).exists()]


def unknown_names(codes: Iterator[str]) -> list[str]:
    """Classes, and methods and attributes of classes, that we do not have."""
    found = []
    for code in codes:
        name, _, member = code.removesuffix("()").partition(".")
        if not _CLASS.fullmatch(code if not member else name) and not (member and name in _members()):
            continue
        if name not in _members() or (member and member not in _members()[name]):
            found.append(code)
    return found


def unordered_layers(text: str) -> list[str]:
    """Folders that the table of layers has in another order than `test_layers`, or does not have."""
    rows = text.partition("## Layers")[2].partition("\n## ")[0]
    named = [
        code.removeprefix("gemini/").removesuffix("/").removesuffix(".py")
        for line in rows.splitlines()
        if line.startswith("| `")
        for code in _CODE.findall(line.split("|")[1])
    ]
    heights = [HEIGHT[name] for name in named]
    steps = zip(named, heights, heights[1:], strict=False)
    return [name for name, here, below in steps if here < below] + sorted(HEIGHT.keys() - set(named))


def invented_calls(text: str) -> list[str]:
    """Calls in excerpts of Python that are nowhere in the code."""
    code = "\n".join(sources().values())
    excerpts = (fence for fence in _FENCE.findall(text) if fence.lstrip().startswith("```python"))
    return [call for excerpt in excerpts for call in re.findall(r"[\w.]+\(", excerpt) if call not in code]


def rows_without_test(text: str) -> list[str]:
    """Rows of the last table that name no test."""
    rows = text.partition("## Where do I change")[2].splitlines()
    return [row for row in rows if row.startswith("| ") and "](../tests/" not in row and not row.startswith("| what ")]


def unproved_numbers(text: str) -> list[str]:
    """Numbers in README's table of results that are not in the rows or paragraphs of benchmarks.md that it links to."""
    rows = text.partition("## Results")[2].partition("\n## ")[0].splitlines()
    found = []
    for row in (row for row in rows if row.startswith("| ") and not row.startswith("| what ")):
        anchors = re.findall(r"\(docs/benchmarks\.md#(row-[\w-]+)\)", row)
        proof = " ".join(_proof(anchor) for anchor in anchors)
        said = re.findall(r"\d+(?:\.\d+)?", re.sub(r"\(docs/\S+\)|`[^`]*`", "", row))
        found += [number for number in said if number not in proof] if anchors else [row]
    return found


def _proof(anchor: str) -> str:
    """The row of a table, or the paragraph, that has the anchor, with what its section begins with."""
    text = BENCHMARKS.read_text()
    place = text.index(f'<a id="{anchor}"></a>')
    start, end = text.rfind("\n", 0, place), text.index("\n", place)
    if not text[start:].lstrip().startswith("|"):
        end = text.index("\n\n", place)
    section = text[text.rindex("\n## ", 0, place) : place]
    return text[start:end] + section.partition("\n|")[0]


def _anchors(text: str) -> set[str]:
    return _headings(text) | set(re.findall(r'<a id="([\w-]+)"></a>', text))


def _headings(text: str) -> set[str]:
    """As GitHub makes them: lower case, without punctuation, spaces as hyphens."""
    titles = re.findall(r"^#+ (.*)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@cache
def _members() -> dict[str, frozenset[str]]:
    """What each of our classes has, with what it inherits from our other classes."""
    own: dict[str, set[str]] = {}
    bases: dict[str, list[str]] = {}
    for source in sources().values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                own.setdefault(node.name, set()).update(_own(node))
                bases.setdefault(node.name, []).extend(b.id for b in node.bases if isinstance(b, ast.Name))
    return {name: frozenset().union(*(own[cls] for cls in _with_bases(name, bases))) for name in own}


def _own(node: ast.ClassDef) -> Iterator[str]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef):
            yield inner.name
        elif isinstance(inner, ast.AnnAssign | ast.Assign):
            for target in inner.targets if isinstance(inner, ast.Assign) else [inner.target]:
                if isinstance(target, ast.Name):
                    yield target.id
                elif isinstance(target, ast.Attribute):
                    yield target.attr


def _with_bases(name: str, bases: dict[str, list[str]]) -> Iterator[str]:
    yield name
    for base in bases[name]:
        if base in bases:
            yield from _with_bases(base, bases)


def _drawn() -> Iterator[str]:
    """The names in the drawing: classes, and the methods of those that list some."""
    for element in ET.parse(DRAWING).iter():
        if owner := element.get("data-of"):
            yield from (f"{owner}.{method}" for method in (element.text or "").split(", "))
        elif element.get("class", "").split(" ")[0] in ("name", "row"):
            yield from re.findall(r"\w+", element.text or "")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    assert broken_links(name, DOCUMENTS[name].read_text()) == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_exist(name: str) -> None:
    assert missing_paths(DOCUMENTS[name].read_text()) == []


def test_classes_and_methods_of_the_walks_exist() -> None:
    text = ARCHITECTURE.read_text()
    fenced = (code for fence in _FENCE.findall(text) for code in re.findall(r"\b[A-Z]\w+\.[a-z_]+", fence))
    assert unknown_names(iter(_CODE.findall(_FENCE.sub("", text)))) == []
    assert unknown_names(fenced) == []


def test_excerpts_call_what_the_code_calls() -> None:
    assert invented_calls(ARCHITECTURE.read_text()) == []


def test_classes_and_methods_of_the_drawing_exist() -> None:
    names = list(_drawn())
    assert {"Engine.enter", "ChunkManager.quiet", "Planner", "UpdateQueue", "ChunkedStep"} <= set(names)
    assert unknown_names(iter(names)) == []


def test_the_drawing_needs_nothing_from_elsewhere() -> None:
    text = DRAWING.read_text()
    assert re.findall(r"https?://[^\"\s]+", text) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"@import|<image|<script|<foreignObject|url\((?!#)", text)


def test_the_table_of_layers_is_that_of_the_imports() -> None:
    assert unordered_layers(ARCHITECTURE.read_text()) == []


def test_what_can_be_changed_is_held_by_a_test() -> None:
    assert rows_without_test(ARCHITECTURE.read_text()) == []


def test_readme_is_short_and_claims_what_was_measured() -> None:
    text = DOCUMENTS["README.md"].read_text()
    assert len(text.splitlines()) <= 120
    assert unproved_numbers(text) == []


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]))
    listed -= {
        "index.md",
        "examples.md",
        "contributing.md",
    }  # made by scripts/site_pages.py of the pages of their folders
    assert listed == {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}


def test_the_checks_fire() -> None:
    assert broken_links("docs/lazy.md", "# A b\n[a](../README.md) [b](#a-b) [c](gone.md) [d](#c) [e](https://x.y)") == [
        "gone.md",
        "#c",
    ]
    assert missing_paths("see chunk/chunk.py, chunk/gone.py and `gemini/engine/`, `gemini/gone/`, a/chunk/x.py") == [
        "chunk/gone.py",
        "gemini/gone/",
    ]
    codes = ["Engine.enter", "Engine.gone", "Chunk.state", "GoneClass", "Chunk", "float32", "nn.Parameter", "Tensor"]
    assert unknown_names(iter(codes)) == ["Engine.gone", "GoneClass"]
    assert invented_calls("```python\nself.pacing.evict(x)\nself.pacing.gone(x)\n```") == ["self.pacing.gone("]
    assert "planning" in unordered_layers("## Layers\n| `gemini/planning/` | a |\n| `gemini/engine/` | b |\n")
    assert rows_without_test("## Where do I change\n| what | where |\n| a | [b](../tests/x.py) |\n| c | d |\n") == [
        "| c | d |"
    ]
    assert unproved_numbers(
        "## Results\n| a | 1093 ms, 7.77 | [row](docs/benchmarks.md#row-step) |\n| b | 5 | |\n"
    ) == [
        "7.77",
        "| b | 5 | |",
    ]
