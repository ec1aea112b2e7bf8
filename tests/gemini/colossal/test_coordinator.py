"""`DistCoordinator` in one process and in two."""

import subprocess
import sys
from pathlib import Path

import pytest

from gemini.cluster import DistCoordinator
from gemini.cluster import dist_coordinator as where_colossalai_has_it

RANK = """
import sys, time, os
from pathlib import Path
import torch.distributed as dist
from gemini.cluster import DistCoordinator

coordinator = DistCoordinator()  # older than the process group
assert (coordinator.rank, coordinator.world_size) == (0, 1)
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

@coordinator.on_master_only()
def rank_of_master():
    return coordinator.rank

assert (coordinator.rank, coordinator.world_size) == (rank, 2)
assert (coordinator.is_master(), coordinator.is_last_process()) == (rank == 0, rank == 1)
assert rank_of_master() == (0 if rank == 0 else None)
coordinator.print_on_master("of rank 0")

for first in (0, 1):
    with coordinator.priority_execution(first):
        if rank == first:
            (folder / f"made by {first}").touch()
        assert (folder / f"made by {first}").exists()
try:
    with coordinator.priority_execution():
        assert rank != 0, "only the first one fails"
except AssertionError:
    assert rank == 0
try:
    with coordinator.priority_execution(2):
        raise AssertionError
except ValueError as error:
    assert "ranks 0 to 1, got 2" in str(error)

alone = [dist.new_group([each]) for each in (0, 1)][rank]
assert coordinator.is_master(alone) and coordinator.is_last_process(alone)
coordinator.block_all(alone)  # or it would wait for the other rank, which is in a group of its own
dist.barrier()

try:
    coordinator.print_on_node_master("x")
except RuntimeError as error:
    assert "has no LOCAL_RANK" in str(error)
os.environ["LOCAL_RANK"] = str(1 - rank)
assert (coordinator.local_rank, coordinator.is_node_master()) == (1 - rank, rank == 1)
coordinator.print_on_node_master("of local rank 0")
coordinator.destroy()
assert (coordinator.rank, coordinator.world_size) == (0, 1)
"""


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)


def test_without_a_process_group_this_is_rank_0_of_1(capsys: pytest.CaptureFixture[str]) -> None:
    coordinator = DistCoordinator()
    assert (coordinator.rank, coordinator.world_size, coordinator.local_rank) == (0, 1, 0)
    assert coordinator.is_master() and coordinator.is_node_master() and coordinator.is_last_process()
    coordinator.print_on_master("first")
    coordinator.print_on_node_master("second")
    assert capsys.readouterr().out == "first\nsecond\n"


def test_without_a_process_group_nothing_waits() -> None:
    coordinator = DistCoordinator()
    coordinator.block_all()
    with coordinator.priority_execution():
        entered = True
    coordinator.destroy()
    assert entered


def test_a_function_on_the_master_only_keeps_its_name_and_what_it_returns() -> None:
    @DistCoordinator().on_master_only()
    def add(a: int, b: int) -> int:
        return a + b

    assert add.__name__ == "add"
    assert add(1, b=2) == 3


def test_the_local_rank_is_what_the_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert DistCoordinator().local_rank == 3
    assert not DistCoordinator().is_node_master()


def test_it_is_the_same_class_in_the_module_where_colossalai_has_it() -> None:
    assert where_colossalai_has_it.DistCoordinator is DistCoordinator


def test_two_processes_know_their_ranks_and_wait_for_each_other(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait(30)
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert outputs == ["of rank 0\n", "of local rank 0\n"]
