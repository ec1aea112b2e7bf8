"""scripts/faults power: passes, and fails where a checkpoint's fsync is missing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
_SABOTAGED = """
import runpy, sys
sys.path[:0] = [{here!r}, {root!r}]
import sabotage
getattr(sabotage, {name!r})()
sys.argv = ["faults", "power"]
sys.path.insert(0, {faults!r})
runpy.run_path({faults!r}, run_name="__main__")
"""


def power(sabotage: str | None) -> tuple[int, dict[str, Any]]:
    faults = str(ROOT / "scripts/faults")
    names = {"here": str(Path(__file__).parent), "root": str(ROOT), "faults": faults, "name": sabotage}
    command = [faults, "power"] if sabotage is None else ["-c", _SABOTAGED.format(**names)]
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_no_save_is_lost() -> None:
    status, found = power(None)
    assert status == 0 and found["ok"]
    assert found["save"]["old"] and found["save"]["new"], "the power failed too early or too late to show anything"


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("sabotage", "losing"),
    [
        ("drop_syncs_of_files", {"save", "save in the background", "save_model"}),
        ("drop_syncs_of_folders", {"save", "save in the background", "save_model"}),
    ],
)
def test_a_dropped_fsync_is_a_failure(sabotage: str, losing: set[str]) -> None:
    status, found = power(sabotage)
    assert status == 1 and not found["ok"]
    assert {name for name, each in found.items() if name != "ok" and each["lost"]} == losing
