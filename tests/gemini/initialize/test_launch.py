"""``launch_from_torch``, ``launch_from_slurm`` and ``launch``: in this process, and in processes that meet."""

import os
import random
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from gemini.errors import LaunchError
from gemini.initialize import launch, launch_from_slurm, launch_from_torch, process_group

RANK_OF_TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
TASK_OF_SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_TASKS_PER_NODE": "1",
}


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("world_size", [None, "1"])
def test_a_single_process_gets_no_process_group(monkeypatch: pytest.MonkeyPatch, world_size: str | None) -> None:
    if world_size:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    launch_from_torch({})
    assert not dist.is_initialized()


@pytest.mark.parametrize("variables", [RANK_OF_TORCHRUN, TASK_OF_SLURM], ids=["torchrun", "srun"])
def test_a_single_rank_of_a_launcher_gets_a_group_of_one(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    set_all(monkeypatch, variables)
    launch_from_torch({})
    assert (dist.get_rank(), dist.get_world_size(), os.environ["LOCAL_WORLD_SIZE"]) == (0, 1, "1")
    total = torch.ones(2)
    dist.all_reduce(total, group=dist.new_group([0]))
    gathered = [None]
    dist.all_gather_object(gathered, "mine")
    assert (total.tolist(), gathered) == ([1, 1], ["mine"])
    launch_from_torch({})  # a second call does nothing


def test_a_batch_script_of_slurm_is_a_single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = {name: value for name, value in TASK_OF_SLURM.items() if "STEP" not in name}
    set_all(monkeypatch, {**batch, "SLURM_NTASKS": "8", "ENVIRONMENT": "BATCH"})
    launch_from_torch({})
    assert not dist.is_initialized()
    with pytest.raises(ValueError, match="start the script with srun"):
        launch_from_slurm()


def test_torchruns_variables_go_before_those_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {**TASK_OF_SLURM, "SLURM_STEP_NUM_TASKS": "4", **RANK_OF_TORCHRUN})
    launch_from_torch({})
    assert dist.get_world_size() == 1


def test_a_process_group_that_exists_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    launch(0, 1, "", 0)
    group = dist.group.WORLD
    set_all(monkeypatch, {**RANK_OF_TORCHRUN, "WORLD_SIZE": "4"})
    launch_from_torch({})
    launch(0, 1, "", 0)
    assert dist.group.WORLD is group
    with pytest.raises(ValueError, match=r"rank 1 of 4 was asked for, .* as rank 0 of 1"):
        launch(1, 4, "localhost", 1)


def test_the_process_group_is_left_at_the_end_of_a_process_that_has_not_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    at_the_end: list[Callable[[], None]] = []
    monkeypatch.setattr(process_group, "at_exit", at_the_end.append)
    launch(0, 1, "", 0, backend="gloo")
    (leave,) = at_the_end
    with monkeypatch.context() as failed:
        failed.setattr(sys, "last_type", ValueError, raising=False)  # Python's, after an exception that nobody caught
        leave()
    assert dist.is_initialized()
    monkeypatch.delattr(sys, "last_type", raising=False)
    leave()
    assert not dist.is_initialized()
    leave()


def test_it_seeds_only_when_asked_to() -> None:
    def draws() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    before = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        launch_from_torch()
        assert torch.equal(torch.random.get_rng_state(), before[2])
        launch_from_torch({"seed": 7})
        first = draws()
        launch(0, 1, "", 0, seed=7)
        assert draws() == first
        launch_from_torch(seed=7)
        assert draws() == first
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.random.set_rng_state(before[2])


@pytest.mark.parametrize("given", [{"config": "gloo"}, {"config": {"backend": "gloo"}}, {"backend": "gloo"}], ids=str)
def test_the_backend_is_what_was_asked_for(monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]) -> None:
    set_all(monkeypatch, RANK_OF_TORCHRUN)
    launch_from_torch(**given)
    assert dist.get_backend() == "gloo"


def test_an_unknown_key_is_named() -> None:
    with pytest.raises(ValueError, match="fp16"):
        launch_from_torch({"fp16": {}})


@pytest.mark.parametrize(
    ("environment", "named"),
    [({}, "RANK"), ({"RANK": "x"}, "RANK"), ({"RANK": "0", "LOCAL_RANK": "0"}, "MASTER_ADDR")],
)
def test_a_missing_or_wrong_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], named: str
) -> None:
    set_all(monkeypatch, {"WORLD_SIZE": "2", **environment})
    with pytest.raises(ValueError, match=named):
        launch_from_torch()


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_that_cannot_be_is_refused(rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match=rf"got {rank}"):
        launch(rank, world_size, "localhost", 1)


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_do_not_come_are_an_error_within_the_timeout(rank: int, free_port: int) -> None:
    address = f"127.0.0.1:{free_port}"
    with pytest.raises(LaunchError, match=rf"rank {rank} of 2 .* at {re.escape(address)} within 1 s: .*MASTER_ADDR"):
        launch(rank, 2, "127.0.0.1", free_port, timeout=timedelta(seconds=1))
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("changed", "cores", "hinted"),
    [
        ({}, 8, True),
        ({}, 1, False),  # as many ranks as cores
        ({"OMP_NUM_THREADS": "2"}, 8, False),  # by the user
        ({"LOCAL_WORLD_SIZE": "1"}, 8, False),  # torchrun leaves the variable alone
        ({"TORCHELASTIC_RUN_ID": ""}, 8, False),
        ({"RANK": "1", "WORLD_SIZE": "2"}, 8, False),
    ],
)
def test_rank_0_says_when_torchrun_leaves_cores_idle(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], cores: int, hinted: bool
) -> None:
    monkeypatch.setattr(process_group, "usable_cores", lambda: cores)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    # Rank 1's group is made by a fake backend, which needs no other process.
    backend = "gloo"
    by_torchrun = {"TORCHELASTIC_RUN_ID": "a", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    set_all(monkeypatch, {**RANK_OF_TORCHRUN, **by_torchrun, **changed})
    if changed.get("RANK") == "1":
        from torch.testing._internal.distributed.fake_pg import FakeStore

        backend = "fake"
        monkeypatch.setattr(process_group, "_store", lambda *_: FakeStore())
        set_all(monkeypatch, {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        launch_from_torch(backend=backend)
        launch_from_torch(backend=backend)
    assert [f"OMP_NUM_THREADS={cores} torchrun" in str(warning.message) for warning in caught] == [True] * hinted


def test_tasks_of_slurm_meet_and_libraries_find_torchruns_variables(free_port: int) -> None:
    code = (
        "import os, torch, torch.distributed as dist, gemini\n"
        "gemini.launch_from_torch({}, backend='gloo', timeout=60)\n"
        "gemini.launch_from_torch({})\n"
        "total = torch.tensor([dist.get_rank() + 1]); dist.all_reduce(total)\n"
        "assert (total.item(), dist.get_world_size()) == (3, 2)\n"
        "names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR')\n"
        "rank = str(dist.get_rank())\n"
        "assert [os.environ[name] for name in names] == [rank, '2', rank, '2', 'localhost']\n"
        "dist.barrier()\n"
        "dist.destroy_process_group()\n"
    )
    variables = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "MASTER_PORT": str(free_port)}
    shared = {**os.environ, **TASK_OF_SLURM, **variables}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code], env={**shared, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        )
        for rank in range(2)
    ]
    try:
        assert [child.wait(120) for child in children] == [0, 0]
    finally:
        for child in children:
            child.kill()
            child.wait(30)
