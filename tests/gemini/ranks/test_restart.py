"""torchrun starts the ranks again when one is killed, and training goes on from the last checkpoint, bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CHILD = Path(__file__).with_name("child_restart.py")
SECONDS = 180

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(3 * SECONDS)]


def losses(folder: Path, killed_at: int) -> list[dict[str, str]]:
    """Of each rank, by step."""
    folder.mkdir()
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"),
            *(str(CHILD), str(folder), str(killed_at)),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    assert ("SIGKILL" in run.stderr or "exitcode: -9" in run.stderr) == (killed_at >= 0), run.stderr[-4000:]
    lines = [(folder / f"losses-{rank}").read_text().splitlines() for rank in range(2)]
    return [dict(line.split(" ", 1) for line in each) for each in lines]


def test_a_run_whose_rank_is_killed_has_the_losses_of_one_that_is_left_alone(tmp_path: Path) -> None:
    alone = losses(tmp_path / "alone", -1)
    assert len(alone[0]) == 5
    assert losses(tmp_path / "killed", 2) == alone
