"""A training in a child whose memory the system limits, in bytes a parameter."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def limited(bytes_a_parameter: float, layers: int, **plugin: Any) -> subprocess.CompletedProcess[str]:
    """Train ``layers`` of a million parameters each; the last line has the losses and the number of evictions."""
    command = [sys.executable, str(Path(__file__).parent / "child_limited.py"), str(bytes_a_parameter), str(layers)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    return subprocess.run(
        [*command, json.dumps(plugin)], env=environment, capture_output=True, text=True, timeout=120, cwd=ROOT
    )


def outcome(done: subprocess.CompletedProcess[str]) -> Any:
    """What a training that came to its end says."""
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])
