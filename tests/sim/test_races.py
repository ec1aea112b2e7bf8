"""Memory that is handed on, and threads that work for others: nothing is read or written too early or too late."""

import gc
from functools import partial
from typing import Any

import pytest
import torch
from sim_tasks import LOOP_PLACEMENTS, OnDevice
from simulated import SimulatedDevice
from test_parity import Other, check_loop

from gemini.boosted import boosted
from gemini.chunk import (
    AcceleratorBackend,
    ChunkLayout,
    GradientBuffer,
    Ledger,
    MemoryMap,
    SingleProcess,
    Slot,
    Tier,
    accelerator,
    driver_of,
)
from gemini.chunk.conversion import conversion_pieces
from gemini.chunk.eviction import Eviction
from gemini.chunk.full_copies import FullCopies
from gemini.chunk.gradient_pool import GradientPool
from gemini.chunk.snapshots import Snapshots
from gemini.nn.optimizer.rules import pieces

pytestmark = pytest.mark.own_process()

ONLY_WHAT_IS_NEEDED = (0.0, 1.0)


def check_memory_of_the_users_own(numel: int) -> None:
    """What was just freed comes first, and is filled before other streams go on."""
    others = [torch.full((numel,), 7.0, device="sim") for _ in range(20)]
    torch.accelerator.current_stream().synchronize()
    torch.accelerator.synchronize()
    assert all(bool(other.eq(7).all()) for other in others)


def test_a_model_that_is_dropped_does_not_write_to_memory_that_others_have_got(device: SimulatedDevice) -> None:
    device.seed(0, *ONLY_WHAT_IS_NEEDED)
    run = OnDevice(dict(LOOP_PLACEMENTS["host"]))
    run.step(0)
    manager = boosted(run.model).manager
    manager.settle()
    manager.eviction.evict_idle()
    torch.accelerator.synchronize()
    torch.accelerator.empty_cache()
    chunk = next(chunk for chunk in manager.chunks if not chunk.full_is_home)
    numel = chunk.full.numel()
    manager.fetch(chunk, background=True)
    assert device.pending
    del run, manager, chunk
    gc.collect()
    check_memory_of_the_users_own(numel)


def test_a_fetch_that_fails_does_not_write_to_memory_that_others_have_got(
    device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.seed(0, *ONLY_WHAT_IS_NEEDED)
    backend = AcceleratorBackend(driver_of(torch.device("sim", 0)), None, True)
    home, full = backend.home(Tier.HOST, 60000, torch.float32), torch.empty(60000, dtype=torch.bfloat16, device="sim")
    copy, copied = torch.Tensor.copy_, 0

    def failing(*arguments: Any, **more: Any) -> Any:
        nonlocal copied
        copied += 1
        if copied > 2:
            raise RuntimeError("the third copy fails")
        return copy(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", failing)
        patch.setattr(accelerator, "conversion_pieces", partial(conversion_pieces, longest=8192))
        with pytest.raises(RuntimeError, match="the third copy fails"):
            backend.upload(full, home, None, background=False)
    backend.shrink(full)
    check_memory_of_the_users_own(30000)
    backend.close()


@pytest.mark.parametrize("optimizer", ["SGD of Nesterov", "RMSprop with all"])
def test_pieces_of_an_update_stay_in_the_stream_of_the_user(
    device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    monkeypatch.setattr(pieces, "_ACCELERATOR_PIECE_NUMEL", 512)
    for seed in range(3):
        device.seed(seed)
        with torch.Stream("sim"):
            check_loop(Other(optimizer, {}), Other(optimizer, None, place="sim"))


def test_memory_goes_back_to_its_stream_behind_what_another_stream_does_with_it(device: SimulatedDevice) -> None:
    for seed in range(10):
        device.seed(seed)
        backend = AcceleratorBackend(driver_of(torch.device("sim", 0)), None, True)
        full = torch.empty(1000, device="sim")
        backend.shrink(full)
        side = torch.Stream("sim")
        with side:
            backend.grow(full)
            full.fill_(1)
        torch.accelerator.current_stream().wait_stream(side)
        total = full.sum()
        backend.shrink(full)
        with side:
            torch.full((1000,), 7.0, device="sim")
        torch.accelerator.synchronize()
        assert total.item() == 1000
        backend.close()


class Launched:
    """An update whose kernels have been put into a stream (a `Use`)."""

    is_over = True

    def __init__(self, stream: torch.Stream) -> None:
        self._event = torch.Event("sim")
        self._event.record(stream)

    def wait(self) -> None:
        torch.accelerator.current_stream().wait_event(self._event)


def test_the_memory_of_a_gradient_is_lent_again_behind_the_update_that_reads_it(device: SimulatedDevice) -> None:
    layout = ChunkLayout(0, 256, (Slot(0, "p", 0, 256, (256,), (1,)),))
    for seed in range(10):
        device.seed(seed)
        backend = AcceleratorBackend(driver_of(torch.device("sim", 0)), None, True)
        ledger = Ledger({Tier.DEVICE: 1024}, MemoryMap.EMULATED)
        full_copies = FullCopies(ledger, backend, SingleProcess())
        eviction = Eviction(ledger, full_copies, lambda: 0, Snapshots(full_copies, backend, ledger))
        pool = GradientPool(ledger, backend, None, eviction)
        pool.reserve(Tier.DEVICE, 1024, "room")
        borrow = partial(pool.borrow, layout, Tier.DEVICE, torch.float32)
        first, second = (GradientBuffer(layout, None, backend, borrow) for _ in range(2))
        first.add(0, torch.ones(256, device="sim"))
        side = torch.Stream("sim")
        side.wait_stream(torch.accelerator.current_stream())
        with side:
            seen = first.view(0).sum()  # type: ignore[union-attr]
        pool.retire(first, Launched(side))
        first.clear()
        second.add(0, torch.full((256,), 2.0, device="sim"))
        torch.accelerator.synchronize()
        assert seen.item() == 256
        backend.close()


def test_what_other_ranks_have_sent_is_in_homes_on_the_device_when_download_returns(device: SimulatedDevice) -> None:
    """It is done by the thread that sums, in its own stream, and read by an update in another."""
    backend = AcceleratorBackend(driver_of(torch.device("sim", 0)), None, True)
    for seed in range(4):
        device.seed(seed, eager=0.0, lazy=1.0)
        home = torch.zeros(1000, device="sim")
        torch.accelerator.synchronize()
        other = torch.Stream(torch.device("sim", 0))
        before = torch.accelerator.current_stream()
        torch.accelerator.set_stream(other)
        for number in range(3):
            backend.download(torch.full((1000,), 2.0**number), home, accumulate=number > 0)
        torch.accelerator.set_stream(before)
        assert torch.equal(home.cpu(), torch.full((1000,), 7.0))
    backend.close()
