"""``launch_from_torch`` in one process and in two."""

import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from gemini.launch import launch_from_torch


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("world_size", [None, "1"])
def test_a_single_process_gets_no_process_group(monkeypatch: pytest.MonkeyPatch, world_size: str | None) -> None:
    if world_size:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    launch_from_torch({})
    assert not dist.is_initialized()


def test_it_seeds_only_when_asked_to() -> None:
    state = torch.random.get_rng_state()
    try:
        launch_from_torch()
        assert torch.equal(torch.random.get_rng_state(), state)
        launch_from_torch({"seed": 7})
        first = torch.rand(3)
        launch_from_torch(seed=7)
        assert torch.equal(torch.rand(3), first)
    finally:
        torch.random.set_rng_state(state)


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
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=named):
        launch_from_torch()


def test_two_processes_meet_and_a_second_call_does_nothing() -> None:
    code = (
        "import torch, torch.distributed as dist, gemini\n"
        "gemini.launch_from_torch({}, backend='gloo', timeout=60)\n"
        "gemini.launch_from_torch({})\n"
        "total = torch.tensor([dist.get_rank() + 1]); dist.all_reduce(total)\n"
        "assert (total.item(), dist.get_world_size()) == (3, 2)\n"
        "dist.destroy_process_group()\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = [
        subprocess.Popen([sys.executable, "-c", code], env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    try:
        assert [child.wait(120) for child in children] == [0, 0]
    finally:
        for child in children:
            child.kill()
            child.wait(30)
