"""Backends: one contract for RAM, CUDA and the fake of the logic tests; buffers and staging."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from backend_contract import NUMEL, check_backend, full_copy
from fakes import FakeBackend

from gemini.chunk import (
    FETCH_WORKERS,
    STORE_BLOCKS,
    AcceleratorBackend,
    DeviceBackend,
    DiskBackend,
    Ledger,
    MemoryBuffer,
    MemoryMap,
    RamBackend,
    Staging,
    Tier,
    driver_of,
)
from gemini.errors import OffloadError

BLOCK_NUMEL = 96  # does not divide NUMEL
CUDA = torch.device("cuda", 0)
needs_cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
BACKENDS: dict[str, Callable[[], DeviceBackend]] = {
    "ram": lambda: RamBackend(Staging(FETCH_WORKERS, BLOCK_NUMEL), Staging(STORE_BLOCKS, BLOCK_NUMEL)),
    "ram, nothing on disk": lambda: RamBackend(Staging(FETCH_WORKERS, BLOCK_NUMEL)),
    "fake": lambda: FakeBackend(1 << 20),
    "cuda": lambda: AcceleratorBackend(driver_of(CUDA), Staging(FETCH_WORKERS, BLOCK_NUMEL, pin=True), pin_homes=True),
    "cuda, unpinned": lambda: AcceleratorBackend(driver_of(CUDA), Staging(FETCH_WORKERS, BLOCK_NUMEL), False),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_cuda if name.startswith("cuda") else []) for name in BACKENDS]
)
def test_a_backend_keeps_the_contract(name: str, tmp_path: Path) -> None:
    check_backend(BACKENDS[name](), tmp_path)


class Broken(RamBackend):
    """Forgets the order of a pending update."""

    def upload(self, full, source, after, background):  # type: ignore[no-untyped-def]
        return super().upload(full, source, None, background)


def test_the_contract_notices_a_backend_that_does_not_wait_for_updates(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check_backend(Broken(Staging(FETCH_WORKERS, BLOCK_NUMEL)), tmp_path)


def test_the_fake_notices_a_byte_too_many_and_a_full_copy_grown_twice() -> None:
    backend = FakeBackend(NUMEL * 2)
    full, other = full_copy(backend, torch.bfloat16), full_copy(backend, torch.bfloat16)
    backend.grow(full)
    with pytest.raises(AssertionError, match="grown twice"):
        backend.grow(full)
    with pytest.raises(AssertionError, match="4000 of 2000 bytes in use"):
        backend.grow(other)


# -- RAM


def test_a_foreground_move_within_ram_is_over_at_once() -> None:
    backend = RamBackend(None)
    full = full_copy(backend, torch.bfloat16)
    backend.grow(full)
    assert backend.upload(full, backend.home(Tier.HOST, NUMEL, torch.float32), None, background=False).done()
    backend.close()


def test_an_error_of_the_disk_surfaces_at_each_wait_and_no_staging_is_lost(tmp_path: Path) -> None:
    disk, staging = (
        DiskBackend(tmp_path, Ledger({Tier.DISK: 1 << 20}, MemoryMap.EMULATED)),
        Staging(FETCH_WORKERS, BLOCK_NUMEL),
    )
    backend = RamBackend(staging)
    home = disk.allocate(NUMEL, torch.float32, "x")
    disk.close()
    full = full_copy(backend, torch.bfloat16)
    backend.grow(full)
    for background in (True, False, True, False):  # more often than there are blocks
        transfer = backend.upload(full, home, None, background)
        for _ in range(2):
            with pytest.raises(OffloadError):
                transfer.wait()
        assert transfer.done()
    assert {staging.borrow().data_ptr() for _ in range(FETCH_WORKERS)}
    backend.close()


@pytest.mark.timeout(60)
def test_more_fetches_than_blocks_and_workers_all_arrive(tmp_path: Path) -> None:
    disk = DiskBackend(tmp_path, Ledger({Tier.DISK: 1 << 20}, MemoryMap.EMULATED))
    backend = RamBackend(Staging(1, 32))
    homes = [disk.allocate(NUMEL, torch.float32, "x") for _ in range(20)]
    fulls = [full_copy(backend, torch.bfloat16) for _ in homes]
    transfers = []
    for i, (home, full) in enumerate(zip(homes, fulls, strict=True)):
        home.write(0, torch.full((NUMEL,), float(i)))
        backend.grow(full)
        transfers.append(backend.upload(full, home, None, background=True))
    for i in reversed(range(20)):
        transfers[i].wait()
        assert torch.equal(fulls[i], torch.full((NUMEL,), float(i), dtype=torch.bfloat16))
    backend.close()
    disk.close()


# -- staging and buffers


@pytest.mark.timeout(30)
def test_a_borrower_waits_until_a_block_is_given_back() -> None:
    staging = Staging(2, 10)
    first, second = staging.borrow(), staging.borrow()
    assert first.data_ptr() != second.data_ptr() and staging.nbytes == 80
    got: list[int] = []
    borrower = threading.Thread(target=lambda: got.append(staging.borrow().data_ptr()))
    borrower.start()
    assert got == []
    staging.give_back(second)
    borrower.join(10)
    assert got == [second.data_ptr()]


def test_a_memory_buffer_reads_and_writes_its_tensor() -> None:
    tensor = torch.arange(10.0)
    buffer = MemoryBuffer(Tier.HOST, tensor)
    assert (buffer.numel, buffer.nbytes, buffer.dtype, buffer.tier) == (10, 40, torch.float32, Tier.HOST)
    buffer.write(8, torch.tensor([-1.0, -2.0]))
    assert tensor[8:].tolist() == [-1.0, -2.0]
    out = torch.empty(3)
    buffer.read(7, out)
    assert out.tolist() == [7.0, -1.0, -2.0]


@pytest.mark.parametrize("start", [8, 9, 11])
def test_a_memory_buffer_refuses_what_lies_beyond_its_end(start: int) -> None:
    buffer = MemoryBuffer(Tier.HOST, torch.arange(10.0))
    with pytest.raises((RuntimeError, IndexError)):
        buffer.read(start, torch.empty(3))
    with pytest.raises((RuntimeError, IndexError)):
        buffer.write(start, torch.empty(3))
