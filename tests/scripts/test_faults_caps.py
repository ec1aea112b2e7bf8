"""scripts/faults caps, small: under hard limits training ends with a typed error whose cure works, or trains on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.heavy
def test_under_hard_limits_it_trains_or_its_error_has_a_cure_that_works(tmp_path: Path) -> None:
    file = tmp_path / "counts.json"
    limits = ("--caps", "2", "--lowest", "2", "--counts", "RLIMIT_NPROC=6,RLIMIT_NOFILE=4")
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/faults"), "caps", *limits, "--verbose", "--json", str(file)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(file.read_text())
    assert found["ok"] and found["trials"] == 6
    assert set(found["counts"]) == {"trained", "cured"}
