"""Whether a run goes on, and how it ended."""

import os
import socket
import time
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from gemini.telemetry.layout import HEARTBEAT_SECONDS
from gemini.telemetry.liveness import is_locked


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


def judge(
    lock: Path, pid: int | None, host: str, end: Mapping[str, Any] | None, stats: Mapping[str, float], age: float | None
) -> tuple[RunStatus, str]:
    """The status of a rank, and what explains it.

    Parameters
    ----------
    lock
        The file that the writing process holds locked, and touches as its heartbeat.
    pid, host
        The process that writes.
    end
        The end record, if there is one.
    stats, age
        The newest step's statistics, and the seconds since.
    """
    if end is not None:
        status = RunStatus.CRASHED if end.get("status") == "crashed" else RunStatus.FINISHED
        return status, str(end.get("error") or "") if status is RunStatus.CRASHED else ""
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
