"""The fuzzers find nothing in a moment, and do see what they are for."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def fuzz(target: str, tmp_path: Path, seconds: float = 2.0) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "scripts" / "faults"), "fuzz", target, "--seconds", str(seconds)]
    command += ["--failures", str(tmp_path / "failures"), "--json", str(tmp_path / "counts.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (tmp_path / "counts.json").exists(), done.stderr
    counts: dict[str, Any] = json.loads((tmp_path / "counts.json").read_text())
    assert done.returncode == (0 if counts["ok"] else 1)
    return counts


@pytest.mark.timeout(130)
@pytest.mark.parametrize("target", ["checkpoint", "telemetry", "http"])
def test_nothing_crashes_hangs_or_takes_more_memory(target: str, tmp_path: Path) -> None:
    counts = fuzz(target, tmp_path)
    assert counts["ok"], counts["failures"]
    assert counts["inputs"] > 5
    assert not (tmp_path / "failures").exists()
