"""What the documents hold: pages, blocks of Python, and command lines."""

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")),
        *sorted((ROOT / "docs").rglob("*.md")),
    )
}

PROGRAMS = ("bash", "gemini-stat", "kubectl", "pip", "python", "srun", "ssh", "torchrun")
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`")
_COMMAND = re.compile(r"(?:gemini-stat|python -m gemini\S*|(?:python |bash )?scripts/\S+) ")
_FRAGMENT = re.compile(r"<!-- fragment: (\S.*?) -->\s*$", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A block of Python of a page."""

    line: int
    """Of the page, from 1."""
    code: str
    fragment: str | None
    """Why it does not run by itself, from a comment above it; None: it runs."""


def blocks(text: str) -> list[Block]:
    """The blocks of Python of a page, in its order."""
    found = []
    for fence in _FENCE.finditer(text):
        if fence[2] == "python":
            mark = _FRAGMENT.search(text[: fence.start()])
            line = text.count("\n", 0, fence.start()) + 1
            found.append(
                Block(line=line, code=textwrap.dedent(fence[3]), fragment=" ".join(mark[1].split()) if mark else None)
            )
    return found


def fences(text: str, language: str) -> list[str]:
    """What stands in the blocks of that language."""
    return [textwrap.dedent(fence[3]) for fence in _FENCE.finditer(text) if fence[2] == language]


def commands(text: str) -> Iterator[str]:
    """Command lines: lines indented by four, in ``sh`` fences, behind ``$`` in others, and in inline code."""
    lines = [line for line in _FENCE.sub("", text).splitlines() if line.startswith("    ")]
    for fence in _FENCE.finditer(text):
        if fence[2] in ("sh", "bash"):
            lines += fence[3].splitlines()
        elif fence[2] in ("", "console"):
            lines += [line.strip()[2:] for line in fence[3].splitlines() if line.strip().startswith("$ ")]
    lines += [code for code in _INLINE.findall(_FENCE.sub("", text)) if _COMMAND.match(code)]
    for line in re.sub(r"\\\n\s*", " ", "\n".join(line.strip() for line in lines)).splitlines():
        command = re.split(r"\s+#(?:\s|$)", line)[0].strip()
        words = re.sub(r"^(?:[A-Z_]+=\S* )+", "", command).split(" ")
        if words[0] in PROGRAMS or words[0].startswith("scripts/"):
            yield " ".join(words)
