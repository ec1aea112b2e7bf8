"""Which tiers share memory, and what follows from it."""

import pytest

from gemini.chunk import MemoryMap, Tier

DEVICE, HOST, DISK = Tier


@pytest.mark.parametrize(
    ("memory", "pools"),
    [
        (MemoryMap.UNIFIED, (HOST, DISK)),
        (MemoryMap.EMULATED, (DEVICE, HOST, DISK)),
        (MemoryMap.ACCELERATOR, (DEVICE, HOST, DISK)),
    ],
)
def test_pools_are_the_tiers_with_a_capacity_and_units_run_in_the_fastest(
    memory: MemoryMap, pools: tuple[Tier, ...]
) -> None:
    assert memory.pools == pools and memory.compute_tier is pools[0]
    assert {memory.pool(tier) for tier in Tier} == set(pools)
    nbytes = {tier: i for i, tier in enumerate(pools)}
    assert memory.capacities(nbytes) == {tier: nbytes[memory.pool(tier)] for tier in Tier}


@pytest.mark.parametrize("memory", MemoryMap)
def test_only_unified_memory_is_shared_by_device_and_host(memory: MemoryMap) -> None:
    assert memory.shares(DEVICE, HOST) == memory.shares(HOST, DEVICE) == (memory is MemoryMap.UNIFIED)
    assert not any(memory.shares(DISK, tier) for tier in (DEVICE, HOST))
    assert all(memory.shares(tier, tier) for tier in Tier)


@pytest.mark.parametrize("memory", MemoryMap)
def test_updates_on_the_cpu_do_not_reach_an_accelerator(memory: MemoryMap) -> None:
    assert memory.update_reaches_full(DEVICE)
    for master in (HOST, DISK):
        assert memory.update_reaches_full(master) == (memory is not MemoryMap.ACCELERATOR)
