"""The tests that are marked ``gpu``, as a part of `gpu.py`."""

import re
import sys
from pathlib import Path
from typing import Any

from part_process import ROOT, run_process

FAILED = 1
"""pytest's exit code, and 5 for no test."""


def files() -> list[Path]:
    """Those with such tests: collecting all others takes longer than running them."""
    found = sorted((ROOT / "tests").rglob("test_*.py"))
    return [path for path in found if "pytest.mark.gpu" in path.read_text()]


def run(log: Path, seconds: float) -> list[dict[str, Any]]:
    """How many passed, failed and were skipped, and the names of those that failed."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "-q", "-rf", "-p", "no:cacheprovider", *files()]
    text, ended = run_process(command, log, seconds)
    log.write_text(text + log.read_text())
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", text[-2000:])}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
    found: dict[str, Any] = {word: counts.get(word, 0) for word in ("passed", "failed", "skipped")}
    if failed or counts.get("error"):
        return [{**found, "error": f"{len(failed)} tests failed: {', '.join(failed)}"[:600], "names": failed}]
    return [found] if ended is None or counts else [{"error": ended}]
