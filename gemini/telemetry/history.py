"""A run from its beginning: all generations of a rank's records, thinned out to what fits a chart."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from gemini.safe_files import open_regular
from gemini.telemetry.files import LONGEST_LINE_BYTES, MOST_RECORDS_BYTES, Unreadable, number, numbers, record_of
from gemini.telemetry.layout import GENERATIONS, older_records_file, records_file

_BLOCK_BYTES = 1 << 20


def records(run: Path, rank: int, *, newest_bytes: int | None = None) -> Iterator[dict[str, Any]]:
    """Every readable record, oldest first. ``newest_bytes`` leaves out what lies farther from the end.

    Raises
    ------
    Unreadable
        A newer major version wrote them, or they are larger than a run's.
    """
    files = [older_records_file(run, rank, generation) for generation in range(GENERATIONS, 0, -1)]
    files = [file for file in (*files, records_file(run, rank)) if os.path.isfile(file)]
    sizes = {file: os.stat(file).st_size for file in files}
    for file, size in sizes.items():
        if size > MOST_RECORDS_BYTES:
            raise Unreadable(f"{file} has {size} bytes, more than {MOST_RECORDS_BYTES}")
    skip = 0 if newest_bytes is None else max(0, sum(sizes.values()) - newest_bytes)
    for file, size in sizes.items():
        if skip >= size:
            skip -= size
            continue
        try:
            descriptor = open_regular(file)
        except OSError as error:
            raise Unreadable(f"{file} cannot be read: {error}") from error
        with open(descriptor, "rb") as stream:
            if skip:
                stream.seek(skip)
                stream.readline(LONGEST_LINE_BYTES)
                skip = 0
            for line in _lines(stream):
                if (record := record_of(line, file)) is not None:
                    yield record


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Whole lines with anything in them; those that are too long are left out."""
    begun, is_too_long = b"", False
    for _ in range(MOST_RECORDS_BYTES // _BLOCK_BYTES + 1):  # it may grow while it is read
        if not (block := stream.read(_BLOCK_BYTES)):
            return
        first, *others = block.split(b"\n")
        begun += first
        if len(begun) > LONGEST_LINE_BYTES:
            begun, is_too_long = b"", True
        if others:
            whole = [] if is_too_long else [begun]
            begun, is_too_long = others.pop(), False
            yield from filter(None, [*whole, *others])


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
