"""Under a limit of the operating system, what a model saves need not fit into RAM."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = Path(__file__).parent / "child_capped.py"


def trained(policy: str, folder: Path) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, str(CHILD), policy, str(folder)], capture_output=True, text=True, timeout=250, env=clean
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.mark.heavy
def test_saved_tensors_of_twice_the_limit_are_trained_where_they_may_leave(tmp_path: Path) -> None:
    assert trained("keep", tmp_path) == "OutOfMemory"
    assert float(trained("offload", tmp_path)) > 0
