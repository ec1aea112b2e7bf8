"""Chunks that get other homes while their parameters live on."""

from pathlib import Path

import pytest
import torch
from fakes import FakeBackend
from fault_sites import Fault, tensors
from manager_rig import FROZEN, NUMEL, TRAINABLE, Rig, plan_of

from gemini.chunk import (
    GRADIENT,
    MASTER,
    Chunk,
    ChunkPlan,
    ChunkState,
    DiskBackend,
    Ledger,
    MemoryMap,
    Tier,
    write_slot,
)
from gemini.chunk.disk_file import PAGE_BYTES
from gemini.errors import OffloadError, OutOfMemory

ON_DISK = dict.fromkeys(TRAINABLE, Tier.DISK)


def trained(rig: Rig, index: int, homes: dict[str, Tier] = TRAINABLE) -> ChunkPlan:
    return plan_of(rig.chunks[index].layout, homes, torch.bfloat16, memory=rig.ledger.memory)


@pytest.mark.parametrize("unified", [False, True])
@pytest.mark.parametrize("frozen", [Tier.DEVICE, Tier.HOST, Tier.DISK])
@pytest.mark.parametrize("homes", [TRAINABLE, ON_DISK], ids=["to RAM", "to disk"])
def test_values_stay_and_the_ledger_says_what_there_is(
    homes: dict[str, Tier], frozen: Tier, unified: bool, tmp_path: Path
) -> None:
    disk = DiskBackend(tmp_path, Ledger({Tier.DISK: 1 << 20}, MemoryMap.EMULATED))
    rig = Rig([{MASTER: frozen}, FROZEN], room=4, unified=unified, disk=disk)
    chunk = rig.chunks[0]
    rig.use(chunk)
    graphs = [view.clone() for view in chunk.views]
    saved = chunk.views  # as autograd would have them
    was_home, index = chunk.full_is_home, chunk.index
    on_device = rig.ledger.used(Tier.DEVICE)
    rig.manager.rebuild([trained(rig, 0, homes)])
    assert rig.chunks[0] is chunk and chunk.index == index and chunk.is_trainable and not chunk.full_is_home
    assert chunk.state is ChunkState.HOME and rig.is_poisoned(chunk)
    for position, value in enumerate(rig.values[0]):
        read = rig.manager.read(rig.parameters[0][position], MASTER)
        assert read.dtype is torch.float32 and torch.equal(read, value.bfloat16().float())
        assert not rig.manager.read(rig.parameters[0][position], "exp_avg_sq").any()
    rig.values[0] = [value.bfloat16().float() for value in rig.values[0]]
    rig.use(chunk)
    assert rig.has_values(chunk)
    # Old graphs find the same numbers: in the memory that was a home, or in the full copy, which is there again.
    assert all(torch.equal(view, graph) for view, graph in zip(saved, graphs, strict=True))
    assert (saved is chunk.views) != was_home
    assert rig.ledger.used(Tier.DEVICE) <= on_device + chunk.full_nbytes
    assert rig.used_bytes_agree() or frozen is Tier.DEVICE
    host = sum(h.nbytes for c in rig.chunks for h in c.homes.values() if h.tier is Tier.HOST)
    assert chunk.gradient is not None and chunk.gradient.buffer is not None
    host += chunk.gradient.buffer.nbytes if chunk.gradient.buffer.tier is Tier.HOST else 0
    full = sum(c.full_nbytes for c in rig.chunks if c.is_resident)
    assert rig.ledger.used(Tier.HOST) == host + (full if unified else 0)
    rig.manager.close()


def test_without_room_for_the_last_all_are_as_before() -> None:
    rig = Rig([FROZEN, FROZEN, FROZEN])
    rig.use(rig.chunks[0])
    states = [chunk.state for chunk in rig.chunks]
    rig.ledger.resize(Tier.HOST, rig.ledger.used(Tier.HOST) + 3 * 14 * NUMEL - 1)
    used = rig.ledger.used(Tier.HOST)
    with pytest.raises(OutOfMemory):
        rig.manager.rebuild([trained(rig, i) for i in range(3)])
    assert rig.ledger.used(Tier.HOST) == used
    assert [chunk.state for chunk in rig.chunks] == states and not any(chunk.is_trainable for chunk in rig.chunks)
    assert rig.has_values(rig.chunks[0])
    assert isinstance(rig.device, FakeBackend)
    rig.manager.close()


FROZEN_ON_DISK = {MASTER: Tier.DISK}


def frozen(rig: Rig, index: int) -> ChunkPlan:
    return plan_of(rig.chunks[index].layout, FROZEN_ON_DISK, torch.bfloat16, memory=rig.ledger.memory)


@pytest.mark.parametrize("checksums", [False, True])
def test_rebuilding_on_disk_again_and_again_takes_no_more_room(checksums: bool, tmp_path: Path) -> None:
    counts = Ledger({Tier.DISK: 1 << 20}, MemoryMap.EMULATED)
    disk = DiskBackend(tmp_path, counts, checksums=checksums)
    rig = Rig([FROZEN_ON_DISK, FROZEN_ON_DISK, FROZEN], disk=disk)
    expected = [[value.bfloat16().float() for value in rig.values[i]] for i in range(2)]
    used, sizes = [], []
    for _ in range(3):
        for plans in ([trained(rig, i, ON_DISK) for i in range(2)], [frozen(rig, i) for i in range(2)]):
            rig.manager.rebuild(plans)
            for i, values in enumerate(expected):
                for position, value in enumerate(values):
                    assert torch.equal(rig.manager.read(rig.parameters[i][position], MASTER).float(), value)
            for chunk in rig.chunks[:2]:
                for state in chunk.states:
                    assert not rig.manager.read(rig.parameters[chunk.index][0], state.name).any()
                    write_slot(chunk, 0, state.name, torch.ones(33))  # which must not be found there later
        used.append(counts.used(Tier.DISK))
        sizes.append(disk.file.nbytes)
    assert set(used) == {2 * PAGE_BYTES} and len(set(sizes)) == 1
    rig.manager.close()


def test_masters_that_keep_their_form_and_tier_stay_where_they_are_on_a_full_disk(tmp_path: Path) -> None:
    counts = Ledger({Tier.DISK: 2 * PAGE_BYTES}, MemoryMap.EMULATED)
    disk = DiskBackend(tmp_path, counts)
    rig = Rig([FROZEN_ON_DISK, FROZEN_ON_DISK], disk=disk, dtype=torch.float32)
    written = disk.written_bytes
    assert counts.free(Tier.DISK) == 0
    rig.manager.rebuild(
        [plan_of(chunk.layout, {**TRAINABLE, MASTER: Tier.DISK}, torch.float32) for chunk in rig.chunks]
    )
    assert counts.used(Tier.DISK) == disk.file.nbytes == 2 * PAGE_BYTES and disk.written_bytes == written
    for chunk in rig.chunks:
        assert chunk.is_trainable and chunk.tier is Tier.DISK
        rig.use(chunk)
        assert rig.has_values(chunk)
    rig.manager.close()


@pytest.mark.parametrize("tier", Tier)
def test_a_rebuild_that_fails_has_given_its_room_back_on_every_tier(tier: Tier, tmp_path: Path) -> None:
    counts = Ledger({Tier.DISK: 1 << 20}, MemoryMap.EMULATED)
    disk = DiskBackend(tmp_path, counts)
    rig = Rig([FROZEN_ON_DISK, FROZEN, FROZEN_ON_DISK], room=40, disk=disk)
    plans = [trained(rig, i, dict.fromkeys(TRAINABLE, tier)) for i in range(3)]
    before = rig.ledger.used(Tier.DEVICE), rig.ledger.used(Tier.HOST), counts.used(Tier.DISK)

    def fail(chunk: Chunk) -> None:
        if chunk.index == 2:
            raise OffloadError("the disk is away")

    for _ in range(2):
        with pytest.raises(OffloadError, match="the disk is away"):
            rig.manager.rebuild(plans, fail)
        after = rig.ledger.used(Tier.DEVICE), rig.ledger.used(Tier.HOST), counts.used(Tier.DISK)
        assert after == before and not any(chunk.is_trainable for chunk in rig.chunks)
    size = disk.file.nbytes
    rig.manager.rebuild(plans)
    assert disk.file.nbytes == size and all(chunk.is_trainable for chunk in rig.chunks)
    for chunk in rig.chunks:
        rig.values[chunk.index] = [value.bfloat16().float() for value in rig.values[chunk.index]]
        if tier is not Tier.DEVICE:
            rig.use(chunk)
            assert rig.has_values(chunk)
    rig.manager.close()


MOVES = {
    "trained": (FROZEN, TRAINABLE),
    "trained on disk": (FROZEN_ON_DISK, ON_DISK),
    "to disk": (TRAINABLE, ON_DISK),
    "from disk": (ON_DISK, TRAINABLE),
    "to the device": (TRAINABLE, dict.fromkeys(TRAINABLE, Tier.DEVICE)),
    "from the device": (dict.fromkeys(TRAINABLE, Tier.DEVICE), TRAINABLE),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("unified", [False, True], ids=["emulated", "unified"])
@pytest.mark.parametrize("moves", MOVES)
def test_without_memory_for_a_tensor_chunks_have_the_old_homes_or_the_new_ones(
    moves: str, unified: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    before, after = MOVES[moves]
    counts = Ledger({Tier.DISK: 1 << 20}, MemoryMap.EMULATED)
    disk = DiskBackend(tmp_path, counts)
    rig = Rig([before, before], room=40, unified=unified, disk=disk, dtype=dtype)

    def held() -> tuple[int, ...]:
        in_homes = sum(home.nbytes for chunk in rig.chunks for home in chunk.homes.values() if home.tier is Tier.HOST)
        return rig.ledger.used(Tier.DEVICE), rig.ledger.used(Tier.HOST), counts.used(Tier.DISK), in_homes

    def change(tiers: dict[str, Tier]) -> None:
        plans = [plan_of(chunk.layout, tiers, dtype, memory=rig.ledger.memory) for chunk in rig.chunks]
        rig.manager.rebuild(plans) if GRADIENT not in before else rig.manager.rehoming.move(plans)

    expected = {}
    for tiers in (after, before):
        change(tiers)
        expected[id(tiers)] = held()
    is_given_back = tuple(expected.values())[1]
    fault, at, failed = Fault(), 0, 0
    while True:
        with tensors(fault):
            fault.arm(at)
            try:
                change(after)
            except RuntimeError:
                failed += 1
            fault.disarm()
        assert held() in expected.values()
        for chunk in rig.chunks:
            for position, value in enumerate(rig.values[chunk.index]):
                read = rig.manager.read(rig.parameters[chunk.index][position], MASTER)
                assert torch.equal(read.to(dtype), value.to(dtype))
        change(before)
        assert held() == is_given_back
        if not fault.is_over:
            break
        at += 1
    assert failed > 3
    rig.manager.close()
