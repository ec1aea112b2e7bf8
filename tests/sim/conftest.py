"""Fixtures of the tests on the simulated device. All are marked ``own_process``: its name is global to a process."""

import gc
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from collected import collect_all

sys.path.insert(0, str(Path(__file__).parent))

import torch
from device_build import Unavailable
from sim_tasks import LOOP_PLACEMENTS, PLACEMENTS, SEED, in_folder
from simulated import GIB, SimulatedDevice, register

from gemini.updates.ticket import Ticket
from gemini.updates.update_pipeline import Block
from gemini.updates.update_queue import UpdateQueue


@pytest.fixture(scope="session")
def _registered() -> SimulatedDevice:
    torch.set_num_threads(1)
    try:
        simulated = register()
    except Unavailable as error:
        pytest.skip(str(error))
    return simulated


_modules_frozen = 0


def _freeze_imports() -> None:
    """Keep what imports have made out of the collection before each test: that takes up to half a second.

    What a test before holds on the device would stay there until the process ends, so there must be nothing.
    """
    global _modules_frozen
    if len(sys.modules) > _modules_frozen + _MANY and not torch.accelerator.memory_allocated():
        gc.freeze()
        _modules_frozen = len(sys.modules)


_MANY = 50


@pytest.fixture
def device(_registered: SimulatedDevice) -> Iterator[SimulatedDevice]:
    """The simulated device, at rest, with all its memory."""
    collect_all()  # what failed tests and their errors have held
    _freeze_imports()
    torch.accelerator.synchronize()
    torch.accelerator.empty_cache()
    _registered.seed(SEED)
    yield _registered
    _registered.set_capacity(4 * GIB)


@pytest.fixture(params=PLACEMENTS.values(), ids=PLACEMENTS)
def placement(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    return in_folder(request.param, tmp_path)


@pytest.fixture(params=LOOP_PLACEMENTS.values(), ids=LOOP_PLACEMENTS)
def loop_placement(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    return in_folder(request.param, tmp_path)


@pytest.fixture
def late_updates(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Updates begin when something waits for one of them, and not before."""
    awaited = threading.Event()
    wait, submit, compute = Ticket.wait, UpdateQueue.submit, Block.compute

    def waiting(ticket: Ticket) -> None:
        awaited.set()
        wait(ticket)

    def submitting(queue: UpdateQueue, *arguments: Any) -> Any:
        awaited.clear()
        return submit(queue, *arguments)

    def computing(block: Block) -> None:
        assert awaited.wait(30)
        compute(block)

    monkeypatch.setattr(Ticket, "wait", waiting)
    monkeypatch.setattr(UpdateQueue, "submit", submitting)
    monkeypatch.setattr(Block, "compute", computing)
    yield
    awaited.set()  # a test that has failed leaves updates, which hold their model
