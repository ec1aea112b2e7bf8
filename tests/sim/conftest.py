"""Fixtures of the tests on the simulated device. All are marked ``own_process``: its name is global to a process."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import torch
from device_build import Unavailable
from sim_tasks import PLACEMENTS
from simulated import GIB, SimulatedDevice, register

SEED = int(os.environ.get("GEMINI_MEMORY_SIM_SEED", "0"))
"""Another order of streams in all tests that don't choose one themselves."""


@pytest.fixture(scope="session")
def _registered() -> SimulatedDevice:
    torch.set_num_threads(1)
    try:
        return register()
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def device(_registered: SimulatedDevice) -> Iterator[SimulatedDevice]:
    """The simulated device, at rest, with all its memory."""
    _registered.seed(SEED)
    yield _registered
    torch.accelerator.synchronize()
    _registered.set_capacity(4 * GIB)
    torch.accelerator.empty_cache()


@pytest.fixture(params=PLACEMENTS.values(), ids=PLACEMENTS)
def placement(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    return {**request.param, "offload_dir": tmp_path} if "offload_dir" in request.param else dict(request.param)
