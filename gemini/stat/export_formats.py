"""A run's history in formats of other programs. Pure generators of text."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gemini.stat.text import cell
from gemini.telemetry import history
from gemini.telemetry.documents import read_chunks, valid
from gemini.telemetry.encoding import encode
from gemini.telemetry.files import number
from gemini.telemetry.layout import TIERS
from gemini.telemetry.records import PHASES, Timeline


def as_jsonl(run: Path, ranks: Sequence[int]) -> Iterator[str]:
    """Every record as it was written, rank after rank; each record names its own."""
    for rank in ranks:
        for record in history.records(run, rank):
            yield _line(record) + "\n"


def as_csv(run: Path, ranks: Sequence[int]) -> Iterator[str]:
    """A row a recorded step; the columns are time, rank, and the keys of ``model.memory_stats()``."""
    columns: list[str] | None = None
    for rank in ranks:
        for when, stats in history.steps(run, rank):
            if columns is None:
                columns = list(stats)
                yield _row(["t", "rank", *(cell(name) for name in columns)])
            yield _row([when, rank, *(stats.get(name, "") for name in columns)])


def as_perfetto(run: Path, ranks: Sequence[int]) -> Iterator[str]:
    """Counters and slices in the Trace Event Format, which ui.perfetto.dev and chrome://tracing open.

    The format: "Trace Event Format", Google, counters are events of phase ``C``, complete slices of phase ``X``, times
    in microseconds.
    """
    yield '{"displayTimeUnit":"ms","traceEvents":[\n'
    yield ",\n".join(_named(rank) for rank in ranks)
    for rank in ranks:
        chunks = read_chunks(run, rank)
        units = list(chunks.units) if chunks is not None else []
        for record in history.records(run, rank):
            when = number(record.get("t"))
            if when is None:
                continue
            for event in _events(record, when * 1e6, rank, units):
                yield ",\n" + json.dumps(event, allow_nan=False)
    yield "\n]}\n"


def _line(record: dict[str, Any]) -> str:
    try:
        return json.dumps(record, allow_nan=False, separators=(",", ":"))
    except ValueError:  # another program has written NaN
        return json.dumps(json.loads(encode(record)), separators=(",", ":"))


def _named(rank: int) -> str:
    return json.dumps({"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank}"}})


def _events(record: dict[str, Any], microseconds: float, rank: int, units: list[str]) -> Iterator[dict[str, Any]]:
    stats = record.get("stats")
    if record["type"] == "step" and isinstance(stats, dict):
        used = {tier: value for tier in TIERS if (value := number(stats.get(f"{tier}/used_bytes"))) is not None}
        yield {"ph": "C", "pid": rank, "ts": microseconds, "name": "model data (bytes)", "args": used}
        stalled = number(stats.get("move/stall_seconds"))
        if stalled is not None:
            yield {"ph": "C", "pid": rank, "ts": microseconds, "name": "waited (s)", "args": {"total": stalled}}
        seconds = number(stats.get("step/seconds"))
        count = number(stats.get("step/count"))
        if seconds is not None and count is not None and seconds >= 0:
            begin, length = microseconds - seconds * 1e6, seconds * 1e6
            name = f"step {count:.0f}"
            yield {"ph": "X", "pid": rank, "tid": 0, "ts": begin, "dur": length, "name": name, "cat": "step"}
    elif record["type"] == "process":
        resident = number(record.get("rss_bytes"))
        if resident is not None:
            yield {"ph": "C", "pid": rank, "ts": microseconds, "name": "process (bytes)", "args": {"rss": resident}}
    elif record["type"] == "timeline" and (timeline := valid(record, Timeline)) is not None:
        # Moments have an order and no clock: they are laid out evenly behind the step's end, one millisecond each.
        for moment, letter in enumerate(timeline.phase):
            at = microseconds + 1000.0 * moment
            values = {"model": timeline.model_bytes[moment], "non-model": timeline.non_model_bytes[moment]}
            yield {"ph": "C", "pid": rank, "ts": at, "name": "one step by moment (bytes)", "args": values}
            index = timeline.unit[moment]
            name = units[index] if 0 <= index < len(units) else "end"
            phase = PHASES[letter]
            yield {"ph": "X", "pid": rank, "tid": 1, "ts": at, "dur": 1000.0, "name": name, "cat": phase}


def _row(values: list[Any]) -> str:
    out = io.StringIO()
    csv.writer(out).writerow(values)
    return out.getvalue()
