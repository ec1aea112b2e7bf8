"""Files and requests that nobody would make by mistake: mutated ones, judged in a child with limits of memory and time.

    python scripts/faults fuzz {checkpoint,telemetry,http} --seconds 600

A crash is an exception that the reader does not announce, a wrong result, or the end of the child. What failed is kept
below ``--failures``, with what was made of it.
"""

import argparse
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

CHILD = Path(__file__).with_name("_fuzz_child.py")
TARGETS = ("checkpoint", "telemetry", "http")
LIMIT_MIB = {"checkpoint": 3 << 10, "telemetry": 512, "http": 2 << 10}
"""Of a child's data; threads' stacks count, and torch's libraries."""
START_SECONDS, HANG_SECONDS = 180.0, 40.0
_LOG_BYTES = 4000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (60)")
    parser.add_argument("--seed", type=int, default=0, help="of the first child; each further one has the next (0)")
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"), help="where what failed is kept")


@dataclass
class Found:
    """What came of the inputs so far."""

    failures: Path
    outcomes: Counter[str] = field(default_factory=Counter)
    crashes: int = 0
    hangs: int = 0
    above_limit: int = 0
    first_failures: list[str] = field(default_factory=list)
    peak_mib: int = 0

    def add(self, line: dict[str, Any]) -> None:
        """One input, as the child has judged it."""
        self.outcomes[line["outcome"].partition(":")[0]] += 1
        self.peak_mib = max(self.peak_mib, line["peak_mib"])
        if line["is_bad"]:
            is_memory = "MemoryError" in line["outcome"]
            self.above_limit += is_memory
            self.crashes += not is_memory
            self._tell(f"{line['what']} -> {line['outcome']}")

    def lost(self, seed: int, current: Path, what: str, log: str) -> None:
        """The child hangs or is gone, with an input that was not judged."""
        is_hang = what.startswith("no answer")
        self.hangs += is_hang
        self.crashes += not is_hang
        kept = self.failures / f"lost-{seed}"
        kept.mkdir(parents=True, exist_ok=True)
        (kept / "outcome.txt").write_text(f"{what}\n{log}")
        if current.is_dir():
            shutil.copytree(current, kept / "input", symlinks=True, dirs_exist_ok=True)
        elif current.exists():
            shutil.copy(current, kept / "input")
        self._tell(f"{what}, kept in {kept}")

    def _tell(self, text: str) -> None:
        if len(self.first_failures) < 20:
            self.first_failures.append(text[:500])


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    found = Found(arguments.failures.absolute())
    end, seed = time.monotonic() + arguments.seconds, arguments.seed
    while (left := end - time.monotonic()) > 0:
        _one_child(arguments.target, seed, left, found)
        seed += 1
    inputs = sum(found.outcomes.values())
    return {
        "target": arguments.target,
        "seconds": arguments.seconds,
        "ok": inputs > 0 and not (found.crashes or found.hangs or found.above_limit),
        "inputs": inputs,
        "crashes": found.crashes,
        "hangs": found.hangs,
        "above_memory_limit": found.above_limit,
        "limit_mib": LIMIT_MIB[arguments.target],
        "peak_mib": found.peak_mib,
        "outcomes": dict(sorted(found.outcomes.items())),
        "failures": found.first_failures,
    }


def _one_child(target: str, seed: int, seconds: float, found: Found) -> None:
    with TemporaryDirectory(prefix="gemini-fuzz-", ignore_cleanup_errors=True) as folder, TemporaryFile() as log:
        command = [sys.executable, str(CHILD), target, folder, str(seed), str(seconds), str(found.failures)]
        path = os.pathsep.join(str(place) for place in sys.path[1:3])
        child = subprocess.Popen(
            [*command, str(LIMIT_MIB[target])],
            stdout=subprocess.PIPE,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        assert child.stdout is not None
        try:
            problem = _listen(child, found)
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
        if problem is None and child.returncode not in (0, -9):
            problem = f"the child ended with status {child.returncode}"
        if problem is not None:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_BYTES))
            found.lost(seed, Path(folder) / "current", problem, log.read().decode(errors="replace"))


def _listen(child: "subprocess.Popen[bytes]", found: Found) -> str | None:
    """Add what the child says, until it ends; what is wrong with the child itself."""
    assert child.stdout is not None
    descriptor, left_over, seconds = child.stdout.fileno(), b"", START_SECONDS
    while True:
        if not select.select([descriptor], [], [], seconds)[0]:
            return f"no answer for {seconds:.0f} s"
        part = os.read(descriptor, 1 << 16)
        if not part:
            child.wait(HANG_SECONDS)
            return None
        *lines, left_over = (left_over + part).split(b"\n")
        for line in lines:
            seconds = HANG_SECONDS
            found.add(json.loads(line))
