"""Each test begins without a launcher's variables and without a process group, and leaves none."""

import os
import socket
import sys
from collections.abc import Iterator

import pytest
import torch.distributed as dist

LAUNCHERS = ("SLURM_", "TORCHELASTIC_", "OMPI_")
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ENVIRONMENT")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):
        if name in VARIABLES or name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # what the code under test sets goes with the copy
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # torch.distributed sets its own
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
