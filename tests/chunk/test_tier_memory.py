"""Memory of every tier, by one contract; and what is allocated together, all or nothing."""

from functools import partial
from pathlib import Path

import pytest
import torch
from backend_contract import check_tier_memory
from fake_accelerator import FakeAccelerator

from gemini.chunk import AcceleratorBackend, DeviceBackend, DiskBackend, Ledger, MemoryMap, RamBackend, Tier
from gemini.chunk.tier_memory import CountedMemory, TierMemories
from gemini.errors import OutOfMemory

CAPACITY = 1 << 20
BACKENDS = {"ram": partial(RamBackend, None), "accelerator": lambda: AcceleratorBackend(FakeAccelerator(0), None, True)}  # type: ignore[arg-type]


def ledger(memory: MemoryMap = MemoryMap.EMULATED) -> Ledger:
    return Ledger(dict.fromkeys(Tier, CAPACITY), memory)


@pytest.mark.parametrize("tier", [Tier.DEVICE, Tier.HOST])
@pytest.mark.parametrize("name", BACKENDS)
def test_memory_keeps_the_contract(name: str, tier: Tier) -> None:
    backend: DeviceBackend = BACKENDS[name]()
    counts = ledger()
    check_tier_memory(CountedMemory(tier, counts, backend), counts)
    backend.close()


@pytest.mark.parametrize("checksums", [False, True])
def test_the_disk_keeps_the_contract_and_its_file_does_not_grow(checksums: bool, tmp_path: Path) -> None:
    counts = ledger()
    disk = DiskBackend(tmp_path, counts, checksums=checksums)
    check_tier_memory(disk, counts)
    assert disk.file.nbytes <= CAPACITY
    disk.close()


@pytest.mark.parametrize("name", BACKENDS)
def test_what_was_allocated_before_an_error_is_free_again_on_every_tier(name: str, tmp_path: Path) -> None:
    counts, device = ledger(), BACKENDS[name]()
    disk = DiskBackend(tmp_path, counts)
    memories = TierMemories(counts, device, disk)
    kept = [memories.allocate(tier, 1000, torch.float32, "kept") for tier in Tier]
    before = [counts.used(tier) for tier in Tier]
    with pytest.raises(OutOfMemory, match="disk tier out of memory"), memories.all_or_nothing():
        for tier in Tier:
            memories.allocate(tier, 2000, torch.float32, "lost")
        memories.allocate(Tier.DISK, CAPACITY, torch.float32, "too large")
    assert [counts.used(tier) for tier in Tier] == before
    with memories.all_or_nothing():
        more = [memories.allocate(tier, 2000, torch.float32, "more") for tier in Tier]
    for buffer in (*kept, *more):
        memories.free(buffer)
    assert [counts.used(tier) for tier in Tier] == [0, 0, 0]
    disk.close()
    device.close()


def test_a_home_for_which_the_system_has_no_memory_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, device = ledger(), RamBackend(None)
    memory = CountedMemory(Tier.HOST, counts, device)

    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(device, "home", fail)
        with pytest.raises(MemoryError):
            memory.allocate(10, torch.float32, "a home")
    assert counts.used(Tier.HOST) == 0
    device.close()
