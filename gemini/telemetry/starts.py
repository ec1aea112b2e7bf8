"""Which processes write into a run's folder now."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemini.telemetry.files import Unreadable, check_version, number, read_document
from gemini.telemetry.layout import start_file

_MOST_RANKS = 1 << 14
"""All of them are looked at to show one."""


def read_start(path: Path, rank: int) -> dict[str, Any]:
    """What the process that writes the rank's records now has said of itself; empty where an older version writes."""
    file = start_file(path, rank)
    try:
        content = read_document(file)
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    check_version(content, file)
    return content


def ranks_of(path: Path) -> list[int]:
    """The ranks of the run that is in the folder now, in order.

    An earlier run of more ranks, or this one before a restart, may have left files of its own there: the rank that
    began last says which run it is.
    """
    try:
        names = os.listdir(path)
    except OSError as error:
        raise Unreadable(f"{path} cannot be listed: {error}") from error
    digits = [name.removeprefix("rank").removesuffix(".jsonl") for name in names if name.endswith(".jsonl")]
    ranks = sorted({int(text) for text in digits if text.isdecimal() and text.isascii() and len(text) < 10})
    if len(ranks) < 2:
        return ranks
    if len(ranks) > _MOST_RANKS:
        raise Unreadable(f"{path} has records of {len(ranks)} ranks, more than {_MOST_RANKS}")
    starts = {rank: read_start(path, rank) for rank in ranks}
    last = max(starts.values(), key=lambda start: number(start.get("started")) or 0.0)
    return [rank for rank, start in starts.items() if run_of(start)[:2] == run_of(last)[:2]]


def run_of(start: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """What all records have in common that one process wrote; the first two, those of all ranks of a run."""
    return start.get("run_id"), start.get("attempt"), start.get("pid")
