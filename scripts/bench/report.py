"""What all benchmarks share: taking turns, and saying where it was measured."""

import os
import platform
import random
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

UNKNOWN = "-"
PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "deepspeed", "torchao", "bitsandbytes")
REST_SECONDS = 10.0
"""Longer than any OpenMP runtime spins unless it was told to, also where other programs want the cores."""


def timed(action: Callable[[], object]) -> Callable[[], float]:
    """``action``, returning its seconds."""

    def run() -> float:
        begin = time.perf_counter()
        action()
        return time.perf_counter() - begin

    return run


def take_turns(actions: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each action, repeated in rounds: a machine shared with others slows all of them alike.

    Each begins with the threads of all others at rest. OpenMP's spin on their cores for some milliseconds after an
    operation has ended: the next one paid for it unless it was of OpenMP too (measured: 0.45 instead of 0.35 ns a
    parameter for ours after a copy by torch, and nothing for torch's own). The order changes with every round, since
    what one leaves in the caches has to be written back in the time of the next.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    order = random.Random(0)
    for _ in range(repeats):
        for name in order.sample(list(actions), len(actions)):
            _wait_for_rest(processes)
            seconds[name].append(actions[name]())
    return seconds


def _wait_for_rest(processes: Sequence[psutil.Process]) -> None:
    deadline = time.monotonic() + REST_SECONDS
    while any(map(_running_threads, processes)):
        if time.monotonic() > deadline:
            raise RuntimeError(f"a thread still runs {REST_SECONDS} s after an operation; is OMP_WAIT_POLICY active?")
        time.sleep(1e-3)


def _running_threads(process: psutil.Process) -> int:
    """How many threads of a process are on a core or wait for one, without the calling one."""
    me = threading.get_native_id()
    threads = [thread for thread in Path(f"/proc/{process.pid}/task").iterdir() if int(thread.name) != me]
    return sum(map(_is_running, threads))


def _is_running(thread: Path) -> bool:
    try:
        text = (thread / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False  # it has ended
    # The state comes after the name, which may hold anything but ends with the last parenthesis.
    return text.rpartition(")")[2].split()[0] == "R"


def ratio(seconds: Mapping[str, list[float]], name: str, base: str) -> float:
    """How many times longer ``name`` took than ``base``: the median over the rounds."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows with the same keys, which are the head; the first column to the left, all others to the right."""
    head = list(rows[0]) if rows else []
    lines = [head, *([row[name] for name in head] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def machine() -> dict[str, object]:
    """Where this runs."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "commit": commit(),
        "versions": versions(),
    }


def commit() -> str:
    """Of this checkout; with a plus if files differ from it."""
    asked = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "timeout": 60}
    try:
        found = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **asked)  # type: ignore[call-overload]
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], **asked)  # type: ignore[call-overload]
    except OSError:
        return UNKNOWN
    return f"{found.stdout.strip() or UNKNOWN}{'+' if changed.stdout.strip() else ''}"


def versions() -> dict[str, str]:
    """Of torch and of packages that are compared with, where they are installed."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """The same rows for a document."""
    head = list(rows[0]) if rows else []
    lines = [head, ["---"] * len(head), *([row[name] for name in head] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
