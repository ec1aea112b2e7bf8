"""A run from its beginning: all generations of a rank's records, thinned out to what fits a chart."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gemini.telemetry.files import check_version, number, numbers
from gemini.telemetry.layout import GENERATIONS, older_records_file, records_file


def records(run: Path, rank: int, *, newest_bytes: int | None = None) -> Iterator[dict[str, Any]]:
    """Every readable record, oldest first. ``newest_bytes`` leaves out what lies farther from the end.

    Raises
    ------
    Unreadable
        A newer major version wrote them.
    """
    files = [older_records_file(run, rank, generation) for generation in range(GENERATIONS, 0, -1)]
    files = [file for file in (*files, records_file(run, rank)) if file.is_file()]
    skip = 0 if newest_bytes is None else max(0, sum(file.stat().st_size for file in files) - newest_bytes)
    for file in files:
        size = file.stat().st_size
        if skip >= size:
            skip -= size
            continue
        with open(file, "rb") as stream:
            if skip:
                stream.seek(skip)
                stream.readline()
                skip = 0
            for line in stream:
                if not line.endswith(b"\n"):
                    break
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(record, dict) and isinstance(record.get("type"), str):
                    check_version(record, file)
                    yield record


def steps(run: Path, rank: int, *, newest_bytes: int | None = None) -> Iterator[tuple[float, dict[str, float]]]:
    """Time and statistics of each recorded step."""
    for record in records(run, rank, newest_bytes=newest_bytes):
        when = number(record.get("t"))
        if record["type"] == "step" and when is not None and (stats := numbers(record.get("stats"))):
            yield when, stats


def thinned(rows: Iterator[tuple[float, dict[str, float]]], max_points: int) -> list[tuple[float, dict[str, float]]]:
    """At most ``2 * max_points`` rows of any number, in one pass: when there are too many, every other pair goes.

    Of a pair the row with the higher peaks stays, so no peak is lost.
    """
    kept: list[tuple[float, dict[str, float]]] = []
    stride, waiting = 1, []
    for row in rows:
        waiting.append(row)
        if len(waiting) == stride:
            kept.append(max(waiting, key=_height))
            waiting = []
        if len(kept) >= 2 * max_points:
            kept = [max(kept[i : i + 2], key=_height) for i in range(0, len(kept), 2)]
            stride *= 2
    return kept + ([max(waiting, key=_height)] if waiting else [])


def _height(row: tuple[float, Mapping[str, float]]) -> float:
    return sum(row[1].get(f"{tier}/used_bytes", 0.0) for tier in ("device", "host", "disk"))
