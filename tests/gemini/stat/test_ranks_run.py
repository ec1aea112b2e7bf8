"""Ranks that torchrun starts, kills and starts again, as gemini-stat shows them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemini.stat.cli import main
from gemini.telemetry.layout import runs_folder, start_file
from gemini.telemetry.ranks import read_ranks
from gemini.telemetry.run_status import RunStatus

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.heavy
@pytest.mark.timeout(300)
def test_ranks_that_are_started_again_are_one_run_and_the_slow_one_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("child_ranks.py"))],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    (run,) = runs_folder().iterdir()
    starts = [json.loads(start_file(run, rank).read_text()) for rank in range(2)]
    assert [start["restart"] for start in starts] == [1, 1]
    assert starts[0]["attempt"] == starts[1]["attempt"]
    found = read_ranks(run)
    assert [(view.rank, view.status, view.step) for view in found.views] == [
        (0, RunStatus.FINISHED, 8),
        (1, RunStatus.FINISHED, 8),
    ]
    assert found.straggler is not None and found.straggler.rank == 1
    assert found.views[0].window.means["step/wait_seconds"] > found.views[1].window.means["step/wait_seconds"]
    assert main(["check", str(run), "--min-steps", "8"]) == 0
    assert main([str(run)]) == 0
    assert "straggler rank 1" in capsys.readouterr().out
