"""What all benchmarks share: taking turns, and saying where it was measured."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


def timed(action: Callable[[], object]) -> Callable[[], float]:
    """``action``, returning its seconds."""

    def run() -> float:
        begin = time.perf_counter()
        action()
        return time.perf_counter() - begin

    return run


def take_turns(actions: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each action, repeated in rounds: a machine shared with others slows all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            seconds[name].append(action())
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, base: str) -> float:
    """How many times longer ``name`` took than ``base``: the median over the rounds."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


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
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
