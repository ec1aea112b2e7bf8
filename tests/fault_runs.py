"""Children in which operations fail, one after the other, and what they tell, counted."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
HANG_SECONDS = 60.0


@dataclass(slots=True)
class Counts:
    """What became of the operations that failed."""

    injected: int = 0
    unnoticed: int = 0
    """The step was taken, without an error."""
    survived: int = 0
    """An error, and training went on with the bits of plain PyTorch."""
    refused: int = 0
    """With ``update_in_backward``: a part was updated, which was said, and refused until a checkpoint was loaded."""
    untyped: int = 0
    """Of `survived`: the error was none of ours, in code of ours."""
    broken: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    """Errors, by the first words."""
    found: list[dict[str, Any]] = field(default_factory=list)
    """What was broken or untyped."""

    def add(self, line: dict[str, Any]) -> None:
        if "broken" in line:
            self.injected += 1
            self.broken += 1
            self.found.append(line)
            return
        if not line["injected"]:
            return
        self.injected += 1
        if line["torn"]:
            self.refused += 1
        elif line["errors"]:
            self.survived += 1
        else:
            self.unnoticed += 1
        for error in line["errors"]:
            words = error[:60]
            self.kinds[words] = self.kinds.get(words, 0) + 1
        if line["untyped"]:
            self.untyped += 1
            self.found.append(line)

    def plus(self, other: "Counts") -> "Counts":
        sums = {name: getattr(self, name) + getattr(other, name) for name in _NUMBERS}
        return Counts(**sums, found=self.found + other.found)

    def numbers(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in _NUMBERS}


_NUMBERS = ("injected", "unnoticed", "survived", "refused", "untyped", "broken")


def run(setting: str, what: str, site: str, step: int = 1, first: int = 0) -> Counts:
    """All operations of a kind. A child that dies or hangs is broken, and another one goes on behind it."""
    counts, at = Counts(), first
    root = TESTS.parent
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"}
    while True:
        command = [sys.executable, str(TESTS / "child_faults.py"), setting, what, site]
        command += [str(at), str(step), str(HANG_SECONDS)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        for line in lines:
            counts.add(line)
        if done.returncode == 0:
            return counts
        at = (lines[-1]["at"] + step) if lines else at
        counts.add({"at": at, "broken": f"the process ended with {done.returncode}: {done.stderr[-6000:]}"})
        at += step


def table(of: dict[str, Counts]) -> dict[str, Any]:
    """Numbers of each and of all, and what was found."""
    total = Counts()
    for counts in of.values():
        total = total.plus(counts)
    return {
        "ok": total.broken == 0,
        "total": total.numbers(),
        "each": {name: counts.numbers() for name, counts in of.items()},
        "kinds": {name: counts.kinds for name, counts in of.items()},
        "found": {name: counts.found for name, counts in of.items() if counts.found},
    }


def run_all(settings: Iterable[str], sites: Iterable[str], whats: Iterable[str], step: int) -> dict[str, Any]:
    of: dict[str, Counts] = {}
    sites, whats = list(sites), list(whats)
    for setting in settings:
        for what in whats:
            for site in sites:
                name = f"{setting}; {what}; {site}"
                of[name] = run(setting, what, site, step)
                print(f"{name}: {of[name].numbers()}", file=sys.stderr, flush=True)
    return table(of)
