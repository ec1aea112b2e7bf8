"""A home in two parts reads and writes as a whole one does, and each part is counted where it is."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from manager_rig import plan_of

from gemini.chunk import (
    GRADIENT,
    MASTER,
    BufferSpec,
    ChunkPlan,
    DiskBackend,
    Ledger,
    MemoryBuffer,
    MemoryMap,
    Plain,
    RamBackend,
    Staging,
    TensorSpec,
    Tier,
    pack,
)
from gemini.chunk.buffer import DividedBuffer
from gemini.chunk.division import DIVISION_BYTES, Divided, parts
from gemini.chunk.extent import Owner
from gemini.chunk.tier_memory import TierMemories
from gemini.errors import OutOfMemory

NUMEL = 5000
LAYOUT = pack([TensorSpec("w", (NUMEL,), (1,), 0)], NUMEL)[0]
IN_RAM = dict.fromkeys((MASTER, "exp_avg", "exp_avg_sq", GRADIENT), Tier.HOST)


def of_parts(first: int, values: torch.Tensor) -> DividedBuffer:
    copy = values.clone()
    return DividedBuffer(MemoryBuffer(Tier.HOST, copy[:first]), MemoryBuffer(Tier.HOST, copy[first:]))


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_any_range_is_read_written_and_seen_as_in_one_piece(data: st.DataObject) -> None:
    numel = data.draw(st.integers(2, 40))
    whole = torch.arange(numel, dtype=torch.float32)
    first = data.draw(st.integers(1, numel - 1))
    buffer = of_parts(first, whole)
    assert (buffer.numel, buffer.nbytes, buffer.tensor) == (numel, 4 * numel, None)
    for _ in range(4):
        start = data.draw(st.integers(0, numel))
        stop = data.draw(st.integers(start, numel))
        out = torch.empty(stop - start)
        buffer.read(start, out)
        assert torch.equal(out, whole[start:stop])
        view = buffer.in_memory(start, stop)
        assert (view is None) == (start < first < stop)
        if view is not None:
            view.mul_(2)
            whole[start:stop].mul_(2)
        written = torch.rand(stop - start)
        buffer.write(start, written)
        whole[start:stop] = written
    out = torch.empty(numel)
    buffer.read(0, out)
    assert torch.equal(out, whole)


def test_a_range_is_in_memory_only_where_its_part_is(tmp_path: Path) -> None:
    ledger = Ledger(dict.fromkeys(Tier, 1 << 20), MemoryMap.UNIFIED)
    disk, device = DiskBackend(tmp_path, ledger), RamBackend(None)
    memories = TierMemories(ledger, device, disk)
    buffer = memories.allocate_parts(((Tier.HOST, DIVISION_BYTES), (Tier.DISK, 4000)), torch.float32, "w")
    assert buffer.tier is Tier.DISK and [part.tier for part in buffer.parts] == [Tier.HOST, Tier.DISK]
    assert (ledger.used(Tier.HOST), ledger.used(Tier.DISK)) == (DIVISION_BYTES, 4096)
    cut = DIVISION_BYTES // 4
    assert buffer.in_memory(0, cut) is not None
    assert buffer.in_memory(cut - 1, cut + 1) is buffer.in_memory(cut, cut + 1) is None
    memories.free(buffer)
    assert (ledger.used(Tier.HOST), ledger.used(Tier.DISK)) == (0, 0)
    disk.close()
    device.close()


@pytest.mark.parametrize("within", [False, True])
def test_without_room_for_the_rest_the_first_part_is_free_again(within: bool, tmp_path: Path) -> None:
    ledger = Ledger({Tier.DEVICE: 0, Tier.HOST: 1 << 20, Tier.DISK: 4096}, MemoryMap.EMULATED)
    disk, device = DiskBackend(tmp_path, ledger), RamBackend(None)
    memories = TierMemories(ledger, device, disk)
    divided = ((Tier.HOST, DIVISION_BYTES), (Tier.DISK, 8192))
    with pytest.raises(OutOfMemory, match="disk tier"):
        if within:
            with memories.all_or_nothing():
                memories.allocate_parts(divided, torch.float32, "w")
        else:
            memories.allocate_parts(divided, torch.float32, "w")
    assert (ledger.used(Tier.HOST), ledger.used(Tier.DISK)) == (0, 0)
    disk.close()
    device.close()


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_full_copy_is_filled_from_both_parts_and_the_bytes_are_counted_by_tier(
    dtype: torch.dtype, staged: bool, tmp_path: Path
) -> None:
    ledger = Ledger(dict.fromkeys(Tier, 1 << 20), MemoryMap.UNIFIED)
    disk, device = DiskBackend(tmp_path, ledger), RamBackend(Staging(2, 1024) if staged else None)
    memories = TierMemories(ledger, device, disk)
    numel = 5001
    home = memories.allocate_parts(
        ((Tier.HOST, DIVISION_BYTES), (Tier.DISK, numel * 4 - DIVISION_BYTES)), torch.float32, "w"
    )
    values = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    home.write(0, values)
    full = torch.empty(numel, dtype=dtype)
    device.upload(full, home, None, background=True).wait()
    assert torch.equal(full, values.to(dtype))
    sent = device.uploads.nbytes
    assert sent[Tier.HOST] + sent[Tier.DISK] == pytest.approx(full.nbytes, abs=1)
    assert sent[Tier.HOST] == round(full.nbytes * DIVISION_BYTES / home.nbytes)
    disk.close()
    device.close()


def test_a_plan_says_the_parts_and_where_blocks_are_to_be_cut() -> None:
    plan = plan_of(LAYOUT, {**IN_RAM, "exp_avg": Divided(DIVISION_BYTES)}, torch.bfloat16)
    assert plan.parts(MASTER) == ((Tier.HOST, 4 * LAYOUT.numel),)
    assert plan.parts("exp_avg") == ((Tier.HOST, DIVISION_BYTES), (Tier.DISK, 4 * LAYOUT.numel - DIVISION_BYTES))
    assert plan.boundaries == (DIVISION_BYTES // 4,)
    assert plan.nbytes_on(Tier.HOST) == 10 * LAYOUT.numel + DIVISION_BYTES
    assert plan.nbytes_on(Tier.DISK, (MASTER,)) == 0


def test_boundaries_are_elements_whatever_a_buffer_keeps_of_them() -> None:
    codes = BufferSpec("codes", torch.uint8)
    layout = pack([TensorSpec("w", (1 << 17,), (1,), 0)], 1 << 17)[0]
    scales = BufferSpec("scales", torch.float32, block_numel=8)
    tiers = {MASTER: Tier.HOST, "codes": Divided(DIVISION_BYTES), "scales": Divided(4 * DIVISION_BYTES)}
    plan = ChunkPlan(layout, Plain(BufferSpec(MASTER)), (codes, scales), tiers, torch.float32, borrows_gradient=True)
    assert plan.boundaries == (DIVISION_BYTES, 8 * DIVISION_BYTES)


def test_an_owner_whose_extent_ends_before_the_boundary_has_one_part() -> None:
    tiers = {**IN_RAM, MASTER: Divided(DIVISION_BYTES)}
    plan = plan_of(LAYOUT, tiers, torch.bfloat16)
    first, last = (replace(plan, owner=Owner(index, 3)) for index in (0, 2))
    assert last.extent.stop == LAYOUT.numel
    assert first.parts(MASTER) == ((Tier.HOST, 4 * len(first.extent)),) and not first.boundaries


@pytest.mark.parametrize("nbytes", [0, -DIVISION_BYTES, DIVISION_BYTES + 4096])
def test_homes_are_divided_at_whole_blocks_only(nbytes: int) -> None:
    with pytest.raises(ValueError, match=f"divided at a multiple of {DIVISION_BYTES} bytes, got {nbytes}"):
        Divided(nbytes)


def test_masters_that_units_compute_with_are_not_divided() -> None:
    plan = plan_of(LAYOUT, {**IN_RAM, MASTER: Divided(DIVISION_BYTES)}, torch.float32)
    with pytest.raises(ValueError, match="computes with its masters"):
        replace(plan, full_is_home=True)


def test_a_home_no_longer_than_the_first_part_has_no_other() -> None:
    assert parts(Divided(DIVISION_BYTES), DIVISION_BYTES) == ((Tier.HOST, DIVISION_BYTES),)
    assert parts(Tier.DISK, 7) == ((Tier.DISK, 7),)
