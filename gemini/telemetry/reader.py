"""Reading runs from their folders: by any process, at any time, without torch and without disturbing the writer.

The newest records count, so only the tail of a file is read: a run of many days opens as fast as a short one.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemini.telemetry.files import Unreadable, check_version, number, numbers, read_document, read_tail
from gemini.telemetry.layout import RUN_FILE, TIERS, lock_file, records_file
from gemini.telemetry.run_status import judge
from gemini.telemetry.run_view import Identity, RunView, Window
from gemini.telemetry.starts import ranks_of, read_start, run_of

TAIL_BYTES = 1 << 20
_TYPES = frozenset({"start", "step", "timeline", "chunks", "process", "oom", "end"})
_WINDOW_SECONDS = 10.0
_WINDOW_STEPS = 10
_LONGEST_MAP = 1 << 16


def read_run(
    path: Path, rank: int | None = None, *, tail_bytes: int = TAIL_BYTES, most_steps: int | None = None
) -> RunView:
    """Read one rank of the run in folder ``path``: the given one, or the lowest there is now.

    Raises
    ------
    Unreadable
        ``run.json`` is missing or damaged, the rank has no file, or a newer major version wrote them.
    """
    run_file = read_run_file(path)
    rank = next(iter(ranks_of(path)), 0) if rank is None else rank
    said = read_start(path, rank) or (run_file if run_file.get("rank") == rank else {})
    records = _of_this_run(read_tail(records_file(path, rank), tail_bytes, most_steps), said)
    start = next((record for record in records if record["type"] == "start"), {})
    step_records = [record for record in records if record["type"] == "step"]
    steps = [numbers(record.get("stats")) for record in step_records]
    end = records[-1] if records and records[-1]["type"] == "end" else None
    stats = steps[-1] if steps else {}
    stepped = number(step_records[-1].get("t")) if step_records else None
    identity = _identity(path, run_file, {**start, **said})
    age = time.time() - stepped if stepped else None
    status, reason = judge(lock_file(path, rank), identity.pid, identity.host, end, stats, age)
    updated = number(records[-1].get("t")) if records else None
    return RunView(
        path=path,
        rank=rank,
        identity=identity,
        status=status,
        reason=reason,
        updated=updated,
        seen=max((t for t in (updated, _touched(lock_file(path, rank))) if t is not None), default=None),
        stats=stats,
        window=_window(step_records, steps),
        states=_states(records),
        process=_process(records),
        peaks=_peaks(steps),
        summary=numbers(end.get("summary")) if end else {},
        dropped_count=int(number(records[-1].get("dropped")) or 0) if records else 0,
    )


def _identity(path: Path, run_file: Mapping[str, Any], start: Mapping[str, Any]) -> Identity:
    """The process is the rank's own: ``run.json`` may be of another one, and so are the facts in it."""
    process = {**run_file, **start}
    pid, world_size, facts = number(process.get("pid")), number(process.get("world_size")), run_file.get("facts")
    return Identity(
        run_id=str(process.get("run_id", path.name)),
        name=str(process.get("name", "")),
        pid=None if pid is None else int(pid),
        host=str(process.get("host", "")),
        world_size=1 if world_size is None else int(world_size),
        restart=int(number(process.get("restart")) or 0),
        started=number(process.get("started")),
        facts=facts if isinstance(facts, dict) else {},
    )


def read_run_file(path: Path) -> dict[str, Any]:
    file = path / RUN_FILE
    try:
        content = read_document(file)
    except (OSError, ValueError) as error:
        raise Unreadable(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise Unreadable(f"{file} holds no JSON object")
    check_version(content, file)
    return content


def _of_this_run(records: list[dict[str, Any]], said: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Leave out what an earlier run, or this one before a restart, wrote into the same file, and unknown types."""
    begin, segment = 0, None
    for index, record in enumerate(records):
        if record["type"] == "start" and run_of(record) != segment:
            begin, segment = index, run_of(record)
    if said and segment is not None and segment != run_of(said):
        return []  # a new run has said who it is and not yet written its first record
    return [record for record in records[begin:] if record["type"] in _TYPES]


def _window(records: list[dict[str, Any]], steps: list[dict[str, float]]) -> Window:
    """The steps since one that is long enough before the last one, else since the first."""
    now = number(records[-1].get("t")) if records else None
    begin = 0
    for back in range(1, len(records)):
        then = number(records[-1 - back].get("t"))
        if now is not None and then is not None and now - then >= _WINDOW_SECONDS and back >= _WINDOW_STEPS:
            begin = len(records) - 1 - back
            break
    return Window(steps[begin] if len(steps) > 1 else {}, _means(steps[begin + 1 :] or steps))


def _means(steps: list[dict[str, float]]) -> dict[str, float]:
    """Over these steps, of what is measured for each step by itself and known of all of them."""
    keys = [key for key in ("step/seconds", "step/wait_seconds") if steps and all(key in stats for stats in steps)]
    return {key: sum(stats[key] for stats in steps) / len(steps) for key in keys}


def _touched(file: Path) -> float | None:
    try:
        return file.stat().st_mtime
    except OSError:
        return None


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
