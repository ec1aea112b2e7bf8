"""The JSON files beside the records: chunks and units, the last timeline, the last out-of-memory error.

A document that has not the types and lengths of its struct counts as not there.
"""

from pathlib import Path
from typing import Any, TypeVar

from msgspec import DecodeError, Struct, ValidationError, convert
from msgspec.json import decode

from gemini.safe_files import read_file
from gemini.telemetry.files import check_version
from gemini.telemetry.layout import chunks_file, oom_file, timeline_file
from gemini.telemetry.records import Description, Fields, OutOfMemoryDocument, Timeline

_LONGEST = 1 << 20
_MOST_BYTES = 32 << 20
"""Of a document: one of 100,000 parameters has less."""
F = TypeVar("F", bound=Fields)


def read_chunks(run: Path, rank: int) -> Description | None:
    """What is known about the chunks, or None where nothing (readable) was written."""
    return _read(chunks_file(run, rank), Description)


def read_timeline(run: Path, rank: int) -> Timeline | None:
    """The timeline recorded last."""
    return _read(timeline_file(run, rank), Timeline)


def read_oom(run: Path, rank: int) -> OutOfMemoryDocument | None:
    """The last out-of-memory error."""
    return _read(oom_file(run, rank), OutOfMemoryDocument)


class _Version(Struct):
    v: Any = None


def valid(content: object, kind: type[F]) -> F | None:
    """The content as a struct, or None if it is not of that kind."""
    try:
        return convert(content, kind)
    except ValidationError:
        return None


def states_of(text: str, limit: int = _LONGEST) -> str:
    """A chunk map as one letter a chunk: ``"2h1*"`` is ``"hh*"``. What is malformed ends it."""
    letters: list[str] = []
    length = 0
    digits = ""
    for char in text:
        if char.isascii() and char.isdecimal():
            digits += char
            continue
        if not digits or len(digits) > 9 or length + int(digits) > limit:
            break
        letters.append((char if char.isascii() and char.isprintable() else "?") * int(digits))
        length += int(digits)
        digits = ""
    return "".join(letters)


def _read(path: Path, kind: type[F]) -> F | None:
    # Into the struct at once: what it has no field for is skipped, and takes no memory.
    try:
        text = read_file(path, _MOST_BYTES)
        check_version({"v": decode(text, type=_Version).v}, path)
        return decode(text, type=kind)
    except (OSError, DecodeError, ValueError, RecursionError):
        return None
