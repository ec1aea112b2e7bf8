"""Runs of several ranks, made up and written as training writes them.

``python tests/ranked_runs.py [RANKS]`` writes one that goes on until it is interrupted, to be looked at with
``gemini-stat``.
"""

import argparse
import time
from pathlib import Path

from stat_runs import GIB, open_run, stats

from gemini.telemetry.writer import TelemetryWriter

STEP_SECONDS = 0.214
SLOW = 2
"""The rank that the others wait for."""


def own_seconds(rank: int) -> float:
    """What a step of a rank takes without waiting for others."""
    return STEP_SECONDS - 0.002 if rank == SLOW else 0.150 + 0.001 * (rank % 5)


def numbers(rank: int) -> dict[str, float]:
    """What differs from rank to rank."""
    return {
        "step/seconds": STEP_SECONDS,
        "step/wait_seconds": STEP_SECONDS - own_seconds(rank),
        "device/used_bytes": (20 + rank % 3) * GIB,
        "device/peak_bytes": (21 + rank % 3) * GIB,
        "host/used_bytes": (41 - rank % 4) * GIB,
        "host/peak_bytes": (43 - rank % 4) * GIB,
        "non_model/peak_bytes": (4 + (rank == SLOW)) * GIB,
    }


def open_ranks(count: int = 4, steps: int = 12, folder: Path | None = None, **changes: float) -> list[TelemetryWriter]:
    """A run of several ranks, all of this process."""
    return [open_run(steps, folder, rank, count, **{**numbers(rank), **changes}) for rank in range(count)]


def close(writers: list[TelemetryWriter]) -> None:
    for writer in writers:
        writer.close()


def write_on(writers: list[TelemetryWriter], step: int) -> None:
    """One more step of each rank."""
    for rank, writer in enumerate(writers):
        writer.record_step(stats(step, **numbers(rank)))


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ranks", type=int, nargs="?", default=4)
    writers = open_ranks(parser.parse_args().ranks)
    print(writers[0].run_dir, flush=True)
    step = 12
    try:
        while True:
            time.sleep(STEP_SECONDS)
            step += 1
            write_on(writers, step)
    except KeyboardInterrupt:
        close(writers)


if __name__ == "__main__":
    _main()
