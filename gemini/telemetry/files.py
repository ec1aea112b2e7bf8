"""Files of runs, which may be torn, old, newer or not ours at all.

What cannot be understood is skipped; what must be understood and cannot be raises :class:`Unreadable`.
"""

import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemini.telemetry.layout import VERSION


class Unreadable(Exception):
    """Telemetry that is damaged beyond use, or that a newer major version wrote."""


def check_version(record: Mapping[str, Any], file: Path) -> None:
    version = number(record.get("v"))
    if version is not None and version >= VERSION + 1:
        raise Unreadable(
            f"{file} has version {version:g}, this gemini-stat reads up to {VERSION}: update gemini-memory to read it"
        )


def read_regular(file: Path, tail_bytes: int | None = None) -> bytes:
    # O_NONBLOCK: opening a FIFO in its place must not hang.
    with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a regular file")
        if tail_bytes is not None and status.st_size > tail_bytes:
            stream.seek(-tail_bytes, os.SEEK_END)
            stream.readline()  # the rest of a line whose beginning is cut off
        return stream.read()


def read_tail(file: Path, tail_bytes: int, most_steps: int | None = None) -> list[dict[str, Any]]:
    """The records in the last ``tail_bytes``, oldest first. Torn or foreign lines are left out.

    ``most_steps``: of steps, which are most of the lines, only this number of the newest is looked at.
    """
    try:
        data = read_regular(file, tail_bytes)
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
    records = []
    for line in complete:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("type"), str):
            check_version(record, file)
            records.append(record)
    return records


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
