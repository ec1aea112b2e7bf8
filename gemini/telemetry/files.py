"""Files of runs, which may be torn, old, newer or not ours at all.

What cannot be understood is skipped; what must be understood and cannot be raises :class:`Unreadable`.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemini.safe_files import open_regular, read_file
from gemini.telemetry.layout import VERSION

SMALL_DOCUMENT_BYTES = 1 << 20
"""More than any ``run.json`` or start has, and little enough to be made lists of."""
MOST_RECORDS_BYTES = 256 << 20
"""A run begins another file of records when one has a quarter of this."""
LONGEST_LINE_BYTES = 4 << 20
_DEEPEST = 64
"""Lists in lists: what reads deeper ones may fail in what writes them again."""
_TYPE = b'"type"'


class Unreadable(Exception):
    """Telemetry that is damaged beyond use, or that a newer major version wrote."""


def check_version(record: Mapping[str, Any], file: Path) -> None:
    version = number(record.get("v"))
    if version is not None and version >= VERSION + 1:
        raise Unreadable(
            f"{file} has version {version:g}, this gemini-stat reads up to {VERSION}: update gemini-memory to read it"
        )


def read_document(file: Path, most_bytes: int = SMALL_DOCUMENT_BYTES) -> Any:
    """What a JSON file says. Numbers that are none become None.

    Raises
    ------
    OSError, ValueError
        If it cannot be read or is larger, or is no JSON or nested too deep.
    """
    return parsed(read_file(file, most_bytes), _documents)


def parsed(text: bytes, decoder: json.JSONDecoder | None = None) -> Any:
    """JSON that may be written again, by code that calls itself for each list in a list.

    Raises
    ------
    ValueError
        If it is no JSON, or nested too deep.
    """
    try:
        value = json.loads(text) if decoder is None else decoder.decode(text.decode())
    except RecursionError:
        raise ValueError(f"it has more than {_DEEPEST} lists in each other") from None
    if text.count(b"[") + text.count(b"{") > _DEEPEST and _is_deep(value):
        raise ValueError(f"it has more than {_DEEPEST} lists in each other")
    return value


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


_documents = json.JSONDecoder(parse_float=_finite, parse_constant=lambda text: None)


def _is_deep(value: object) -> bool:
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True


def _read_end(file: Path, tail_bytes: int) -> bytes:
    with open(open_regular(file), "rb") as stream:
        if os.fstat(stream.fileno()).st_size > tail_bytes:
            stream.seek(-tail_bytes, os.SEEK_END)
            stream.readline(tail_bytes)  # the rest of a line whose beginning is cut off
        return stream.read(tail_bytes)


def read_tail(file: Path, tail_bytes: int, most_steps: int | None = None) -> list[dict[str, Any]]:
    """The records in the last ``tail_bytes``, oldest first. Torn or foreign lines are left out.

    ``most_steps``: of steps, which are most of the lines, only this number of the newest is looked at.
    """
    try:
        data = _read_end(file, tail_bytes)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise Unreadable(f"{file} cannot be read: {error}") from error
    lines = data.split(b"\n")
    complete = lines[:-1]  # what follows the last newline is being written right now, or was torn by a crash
    if most_steps is not None:
        steps = [index for index, line in enumerate(complete) if b'"type":"step"' in line]
        skipped = set(steps[: max(0, len(steps) - most_steps)])
        complete = [line for index, line in enumerate(complete) if index not in skipped]
    return [record for line in complete if (record := record_of(line, file)) is not None]


def record_of(line: bytes, file: Path) -> dict[str, Any] | None:
    """The record in a line of a file; None if the line is torn or foreign.

    Raises
    ------
    Unreadable
        A newer major version wrote it.
    """
    if _TYPE not in line:
        return None
    try:
        record = parsed(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("type"), str):
        return None
    check_version(record, file)
    return record


def numbers(value: object) -> dict[str, float]:
    if not isinstance(value, dict):
        return {}
    return {str(key): found for key, item in value.items() if (found := number(item)) is not None}


def number(value: object) -> float | None:
    """A finite number that fits 63 bits, so that nothing downstream can overflow; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if abs(value) < 1 << 63 else None
