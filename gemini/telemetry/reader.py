"""Reading runs from their folders: by any process, at any time, without torch and without disturbing the writer.

The newest records count, so only the tail of a file is read: a run of many days opens as fast as a short one. Files
may be torn, old, newer or not ours at all. What cannot be understood is skipped; what must be understood and cannot be
raises :class:`Unreadable`.
"""

import json
import math
import os
import socket
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from gemini.telemetry.layout import HEARTBEAT_SECONDS, RUN_FILE, TIERS, VERSION, lock_file, records_file
from gemini.telemetry.liveness import is_locked

TAIL_BYTES = 1 << 20
_TYPES = frozenset({"start", "step", "timeline", "chunks", "process", "oom", "end"})
_WINDOW_SECONDS = 10.0
_WINDOW_STEPS = 10
_LONGEST_MAP = 1 << 16


class RunStatus(Enum):
    """Whether a run goes on, and how it ended."""

    RUNNING = "running"
    """Its process lives and its newest record is young."""
    STALLED = "stalled"
    """Its process lives but has made no step for long."""
    FINISHED = "finished"
    """It wrote an end record."""
    CRASHED = "crashed"
    """Its end record names an exception, or its process is gone without an end record."""
    UNKNOWN = "unknown"
    """It runs or ran on another host, and its heartbeat is old."""


class Unreadable(Exception):
    """Telemetry that is damaged beyond use, or that a newer major version wrote."""


@dataclass(frozen=True, kw_only=True)
class RunView:
    """State of one rank as its files describe it."""

    path: Path
    run_id: str
    name: str
    pid: int | None
    host: str
    rank: int
    world_size: int
    facts: Mapping[str, Any]
    status: RunStatus
    reason: str
    """Explains the status; empty where the status needs no explanation."""
    started: float | None
    """Seconds since the epoch, as all times here."""
    updated: float | None
    """Time of the newest record."""
    stats: Mapping[str, float]
    """Statistics of the newest step record, finite numbers only; keys as in `gemini.telemetry.statistics`."""
    before: Mapping[str, float]
    """Statistics of a step at least ten seconds and ten steps earlier, else of the first one read, for rates."""
    states: str
    """The newest chunk map, run-length encoded; empty before the first."""
    process: Mapping[str, float]
    """Fields of the newest process record; ``rss_peak_bytes`` is the highest resident size in the records read."""
    peaks: Mapping[str, float]
    """Tier -> highest ``peak_bytes`` in the records read, because training may reset its peaks."""
    summary: Mapping[str, float]
    dropped_count: int

    @property
    def step(self) -> int | None:
        count = self.stats.get("step/count")
        return None if count is None else int(count)

    @property
    def is_live(self) -> bool:
        return self.status in (RunStatus.RUNNING, RunStatus.STALLED)


def read_run(path: Path, rank: int | None = None, *, tail_bytes: int = TAIL_BYTES) -> RunView:
    """Read one rank of the run in folder ``path``: the given one, or the lowest there is.

    Raises
    ------
    Unreadable
        ``run.json`` is missing or damaged, the rank has no file, or a newer major version wrote them.
    """
    run_file = read_run_file(path)
    rank = lowest_rank(path) if rank is None else rank
    current = run_file.get("run_id") if run_file.get("rank") == rank else None
    records = _of_this_run(_read_tail(records_file(path, rank), tail_bytes), current)
    start = next((record for record in records if record["type"] == "start"), {})
    step_records = [record for record in records if record["type"] == "step"]
    steps = [numbers(record.get("stats")) for record in step_records]
    end = records[-1] if records and records[-1]["type"] == "end" else None
    identity: dict[str, Any] = {**run_file, **{key: start[key] for key in ("pid", "host", "started") if key in start}}
    pid = number(identity.get("pid"))
    stats = steps[-1] if steps else {}
    updated = number(records[-1].get("t")) if records else None
    stepped = number(step_records[-1].get("t")) if step_records else None
    host = str(identity.get("host", ""))
    status, reason = _judge(
        path, rank, None if pid is None else int(pid), host, end, time.time() - stepped if stepped else None, stats
    )
    world_size = number(identity.get("world_size"))
    return RunView(
        path=path,
        run_id=str(run_file.get("run_id", path.name)),
        name=str(run_file.get("name", "")),
        pid=None if pid is None else int(pid),
        host=host,
        rank=rank,
        world_size=1 if world_size is None else int(world_size),
        facts=run_file["facts"] if isinstance(run_file.get("facts"), dict) else {},
        status=status,
        reason=reason,
        started=number(identity.get("started")),
        updated=updated,
        stats=stats,
        before=_before(step_records, steps),
        states=_states(records),
        process=_process(records),
        peaks=_peaks(steps),
        summary=numbers(end.get("summary")) if end else {},
        dropped_count=int(number(records[-1].get("dropped")) or 0) if records else 0,
    )


def read_run_file(path: Path) -> dict[str, Any]:
    file = path / RUN_FILE
    try:
        content = json.loads(read_regular(file))
    except (OSError, ValueError, RecursionError) as error:
        raise Unreadable(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise Unreadable(f"{file} holds no JSON object")
    check_version(content, file)
    return content


def check_version(record: Mapping[str, Any], file: Path) -> None:
    version = number(record.get("v"))
    if version is not None and version >= VERSION + 1:
        raise Unreadable(
            f"{file} has version {version:g}, this gemini-stat reads up to {VERSION}: update gemini-memory to read it"
        )


def ranks_of(path: Path) -> list[int]:
    """The ranks that have written, in order."""
    try:
        names = os.listdir(path)
    except OSError as error:
        raise Unreadable(f"{path} cannot be listed: {error}") from error
    digits = [name.removeprefix("rank").removesuffix(".jsonl") for name in names if name.endswith(".jsonl")]
    return sorted({int(text) for text in digits if text.isdecimal() and text.isascii() and len(text) < 10})


def lowest_rank(path: Path) -> int:
    return next(iter(ranks_of(path)), 0)


def _read_tail(file: Path, tail_bytes: int) -> list[dict[str, Any]]:
    """The records in the last ``tail_bytes``, oldest first. Torn or foreign lines are left out."""
    try:
        data = read_regular(file, tail_bytes)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise Unreadable(f"{file} cannot be read: {error}") from error
    lines = data.split(b"\n")
    complete = lines[:-1]  # what follows the last newline is being written right now, or was torn by a crash
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


def _of_this_run(records: list[dict[str, Any]], current: str | None) -> list[dict[str, Any]]:
    """Leave out what an earlier run, or this one before a restart, wrote into the same file, and unknown types."""
    begin = 0
    run_id = segment = None
    for index, record in enumerate(records):
        if record["type"] == "start" and (found := (record.get("run_id"), record.get("restart"), record.get("pid"))):
            if found != segment:
                begin, run_id, segment = index, record.get("run_id"), found
    if current is not None and run_id is not None and run_id != current:
        return []  # a new run has written run.json and not yet its first record
    return [record for record in records[begin:] if record["type"] in _TYPES]


def _judge(
    path: Path,
    rank: int,
    pid: int | None,
    host: str,
    end: Mapping[str, Any] | None,
    age: float | None,
    stats: Mapping[str, float],
) -> tuple[RunStatus, str]:
    if end is not None:
        status = RunStatus.CRASHED if end.get("status") == "crashed" else RunStatus.FINISHED
        return status, str(end.get("error") or "") if status is RunStatus.CRASHED else ""
    lock = lock_file(path, rank)
    if host != socket.gethostname():
        # A lock cannot be asked for across hosts; the heartbeat is the file's time.
        heartbeat = _age_of(lock)
        if heartbeat is not None and heartbeat < 3 * HEARTBEAT_SECONDS:
            return RunStatus.RUNNING, f"on host {host}, judged by its heartbeat"
        return RunStatus.UNKNOWN, f"on host {host}, whose last heartbeat is {_seconds(heartbeat)} old"
    # Within this process a lock neither conflicts nor survives our closing the file: see is_locked.
    if pid != os.getpid() and not is_locked(lock):
        return RunStatus.CRASHED, "its process is gone and wrote no end"
    limit = max(30.0, 5 * stats.get("step/seconds", 0.0))
    # Until the first step there is no pace to judge by: building a large model may take long.
    if stats and age is not None and age > limit:
        return RunStatus.STALLED, f"no step for {_seconds(age)}"
    return RunStatus.RUNNING, ""


def _age_of(file: Path) -> float | None:
    try:
        return max(0.0, time.time() - file.stat().st_mtime)
    except OSError:
        return None


def _seconds(seconds: float | None) -> str:
    return "an unknown time" if seconds is None else f"{seconds:.0f} s"


def _before(records: list[dict[str, Any]], steps: list[dict[str, float]]) -> Mapping[str, float]:
    """A step long enough before the last one to say what happens between them; the first if there is no such."""
    now = number(records[-1].get("t")) if records else None
    for back in range(1, len(records)):
        then = number(records[-1 - back].get("t"))
        if now is not None and then is not None and now - then >= _WINDOW_SECONDS and back >= _WINDOW_STEPS:
            return steps[-1 - back]
    return steps[0] if len(steps) > 1 else {}


def _process(records: list[dict[str, Any]]) -> Mapping[str, float]:
    seen = [numbers(record) for record in records if record["type"] == "process"]
    if not seen:
        return {}
    return {**seen[-1], "rss_peak_bytes": max(record.get("rss_bytes", 0.0) for record in seen)}


def _states(records: list[dict[str, Any]]) -> str:
    for record in reversed(records):
        states = record.get("states")
        if record["type"] == "chunks" and isinstance(states, str):
            return states[:_LONGEST_MAP]
    return ""


def _peaks(steps: list[dict[str, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for tier in TIERS:
        values = [stats[key] for stats in steps if (key := f"{tier}/peak_bytes") in stats]
        if values:
            found[tier] = max(values)
    return found


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
