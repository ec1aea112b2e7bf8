"""Found budgets leave room for what every process needs, under limits that the operating system enforces."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MIXES = {"600MiB": (600, 512, 8), "800MiB": (800, 768, 10), "1200MiB": (1200, 768, 12)}
"""The limit in MiB, the GPT's width and layers: 26M to 87M parameters, more than fit the budget with their states."""


@pytest.mark.one_in(3)
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_a_gpt_trains_under_a_small_limit_with_no_argument_but_offload_dir(
    mix: tuple[int, int, int], tmp_path: Path
) -> None:
    root = Path(__file__).parents[3]
    script = Path(__file__).parent / "child_small_limit.py"
    command = [sys.executable, str(script), *map(str, mix), str(tmp_path)]
    # A thread's stack and arena count against the limit: as many of them on every machine.
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    first, second, third = said["losses"]
    assert first > second > third
    assert all("RLIMIT_DATA" in source and "for what is not model data" in source for source in said["sources"][:2])
