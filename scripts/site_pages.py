"""Hooks of mkdocs: README and the examples' page are pages of the site, and links to the source lead to copies of it.

The documents are written for readers of the repository. A link that leaves ``docs/`` would lead nowhere on the site.
"""

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
MOVED = {"README.md": "index.md", "examples/README.md": "examples.md", "CONTRIBUTING.md": "contributing.md"}
_LINK = re.compile(r"(\[[^\]]*\])\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in ``docs/``, and the files that pages link to."""
    for path, page in MOVED.items():
        text = _with_links_of_the_site((ROOT / path).read_text(), path, page)
        files.append(File.generated(config, page, content=text))
    for target in sorted({target for path in _documents() for target in _source_links(path)}):
        files.append(File.generated(config, _copy(target), content=(ROOT / target).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Have links that leave ``docs/`` lead to the copies."""
    if page.file.src_uri in MOVED.values():
        return markdown
    return _with_links_of_the_site(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)


def _documents() -> list[str]:
    return [*MOVED, *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md")))]


def _source_links(path: str) -> set[str]:
    targets = {_target(path, link) for _, link, _ in _LINK.findall((ROOT / path).read_text())}
    return {each for each in targets if (ROOT / each).is_file() and not each.startswith("docs/") and each not in MOVED}


def _with_links_of_the_site(text: str, path: str, page: str) -> str:
    def replaced(match: re.Match[str]) -> str:
        name, link, anchor = match.groups()
        target = _target(path, link)
        if (ROOT / target).is_dir():
            return name[1:-1]
        if target.startswith("docs/"):
            place = target.removeprefix("docs/")
        elif (ROOT / target).is_file():
            place = MOVED.get(target) or _copy(target)
        else:
            return match[0]
        return f"{name}({os.path.relpath(place, os.path.dirname(page) or '.')}{anchor or ''})"

    return _LINK.sub(replaced, text)


def _target(path: str, link: str) -> str:
    return os.path.normpath(os.path.join(os.path.dirname(path), link))


def _copy(target: str) -> str:
    return f"source/{target}.txt"  # text, so that browsers show it
