"""torchrun starts the ranks again when one was killed: they meet again, and train on from their last checkpoint."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BOOSTED = Path(__file__).with_name("child_restarted.py")

PLAIN = """
import os, signal, sys, torch, torch.distributed as dist, gemini
from pathlib import Path

gemini.launch_from_torch(timeout=60)
total = torch.tensor([dist.get_rank() + 1])
dist.all_reduce(total)
marks = Path(sys.argv[1])
if not (marks / "killed").exists():
    if dist.get_rank() == dist.get_world_size() - 1:
        (marks / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    sys.exit("the barrier ended although a rank is gone")
(marks / f"rank{dist.get_rank()}").write_text(str(total.item()))
dist.barrier()
"""


def torchrun(*arguments: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def ended(agents: "list[subprocess.Popen[bytes]]") -> list[int]:
    try:
        return [agent.wait(200) for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()  # it ends its ranks, which are in sessions of their own
            agent.wait(60)


def test_torchrun_starts_the_ranks_again_when_one_was_killed(tmp_path: Path) -> None:
    (script := tmp_path / "script.py").write_text(PLAIN)
    agent = torchrun("--standalone", "--nproc-per-node=2", "--max-restarts=1", str(script), str(tmp_path))
    assert ended([agent]) == [0]
    assert {file.name: file.read_text() for file in tmp_path.glob("rank*")} == {"rank0": "3", "rank1": "3"}


@pytest.mark.heavy
def test_two_agents_start_their_ranks_again_when_one_was_killed(tmp_path: Path, free_port: int) -> None:
    # Their counts of restarts differ: 0 where no rank failed, 1 on the other machine.
    (script := tmp_path / "script.py").write_text(PLAIN)
    meeting = ("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port}", "--rdzv-id=1")
    options = ("--nnodes=2", "--nproc-per-node=2", "--max-restarts=1", *meeting)
    agents = [torchrun(*options, str(script), str(tmp_path)) for _ in range(2)]
    assert ended(agents) == [0, 0]
    assert {file.name for file in tmp_path.glob("rank*")} == {"rank0", "rank1", "rank2", "rank3"}
    assert {file.read_text() for file in tmp_path.glob("rank*")} == {"10"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert ended([torchrun("--standalone", "--nproc-per-node=2", str(BOOSTED), str(folder))]) == [0]
    return folder


@pytest.mark.heavy
@pytest.mark.parametrize("place", ["forward", "backward", "step", "save"])
def test_a_restart_gives_the_losses_and_weights_of_the_undisturbed_run(
    tmp_path: Path, undisturbed: Path, place: str
) -> None:
    agent = torchrun("--standalone", "--nproc-per-node=2", "--max-restarts=1", str(BOOSTED), str(tmp_path), place)
    assert ended([agent]) == [0]
    assert (tmp_path / "killed").exists()
    for rank in ("losses0", "losses1"):  # the steps that came again have the same losses
        assert set((tmp_path / rank).read_text().splitlines()) == set((undisturbed / rank).read_text().splitlines())
    assert len((tmp_path / "losses1").read_text().splitlines()) > 12
    weights, theirs = torch.load(tmp_path / "weights.pt"), torch.load(undisturbed / "weights.pt")
    assert all(torch.equal(weights[name], theirs[name]) for name in theirs)
