"""A master in two halves: every float32 comes back, and the upper half is the rounded number."""

from pathlib import Path

import pytest
import torch
from manager_rig import TRAINABLE, plan_of
from torch import Tensor

from gemini.chunk import (
    MASTER,
    MASTER_LOW,
    BufferSpec,
    Chunk,
    ChunkManager,
    DiskBackend,
    Ledger,
    MemoryMap,
    RamBackend,
    TensorSpec,
    Tier,
    halves,
    joined,
    marked,
    pack,
    unmarked,
    values,
    write_slot,
)
from gemini.chunk.communicator import ALONE
from gemini.chunk.values import read_slot

ADAM = (BufferSpec("exp_avg"), BufferSpec("exp_avg_sq", has_spare_sign=True))
SPLIT = {**TRAINABLE, MASTER_LOW: Tier.HOST}


def every_upper_half(lower: list[int]) -> Tensor:
    """All bit patterns with these lower 16 bits."""
    upper = torch.arange(1 << 16, dtype=torch.int64)[:, None] << 16
    return (upper | torch.tensor(lower)).flatten().to(torch.int32).view(torch.float32)


def same_bits(a: Tensor, b: Tensor) -> bool:
    nan = b.isnan()
    return torch.equal(a.isnan(), nan) and torch.equal(a[~nan].view(torch.int32), b[~nan].view(torch.int32))


def test_every_number_comes_back_and_its_upper_half_is_the_rounded_one() -> None:
    random = torch.randint(1 << 16, (16,), generator=torch.Generator().manual_seed(0)).tolist()
    numbers = every_upper_half([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, *random])
    high, low, mark = halves(numbers)
    rounded, number_is_nan = numbers.to(torch.bfloat16), numbers.isnan()
    assert torch.equal(high[~number_is_nan].view(torch.int16), rounded[~number_is_nan].view(torch.int16))
    state = torch.rand(numbers.numel(), generator=torch.Generator().manual_seed(1))
    with_marks = marked(state, mark)
    assert same_bits(joined(high, low, with_marks), numbers)
    assert torch.equal(unmarked(with_marks), state)
    # Half of the ties are rounded down, and without the mark they would be taken for the others.
    assert mark.sum() == 1 << 15
    assert not same_bits(joined(high, low, state), numbers)


def manager(states_tier: Tier, disk: DiskBackend | None, ledger: Ledger) -> tuple[ChunkManager, Chunk, list[Tensor]]:
    specs = [TensorSpec("w", (33,), (1,)), TensorSpec("conv", (2, 5, 2), (10, 1, 5))]
    (layout,) = pack(specs, 100)
    homes = {name: states_tier if name.startswith("exp_avg") else tier for name, tier in SPLIT.items()}
    found = ChunkManager(
        [plan_of(layout, homes, torch.bfloat16, ADAM, memory=MemoryMap.UNIFIED)], ledger, RamBackend(None), disk
    )
    chunk = found.chunks[0]
    parameters = [torch.empty_strided(slot.shape, slot.stride, dtype=torch.bfloat16) for slot in layout.slots]
    for position, parameter in enumerate(parameters):
        write_slot(chunk, position, MASTER, torch.zeros(()))
        found.bind(parameter, chunk, position)
    return found, chunk, parameters


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DISK])
@pytest.mark.parametrize("piece_numel", [7, 1 << 20])
def test_masters_and_states_are_read_as_they_were_written(
    tier: Tier, piece_numel: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(values, "_PIECE_NUMEL", piece_numel)
    ledger = Ledger({Tier.DEVICE: 1 << 20, Tier.HOST: 1 << 20, Tier.DISK: 1 << 20}, MemoryMap.UNIFIED)
    disk = DiskBackend(tmp_path, ledger) if tier is Tier.DISK else None
    chunks, chunk, parameters = manager(tier, disk, ledger)
    try:
        assert chunk.full_is_home and chunk.is_split and chunk.plan.codec.dtype is torch.float32
        assert chunk.gradient is not None and chunk.gradient.buffer is not None
        homes = [*chunk.homes.values(), chunk.gradient.buffer]
        assert sum(home.nbytes for home in homes) == 14 * chunk.layout.numel and chunk.full_nbytes == 0
        ties = every_upper_half([0x8000])[0x3F00:0x3F40]  # around 1, even and odd ones
        for round_ in range(3):
            masters = [ties[round_ : round_ + 33], ties[: 2 * 5 * 2].view(2, 5, 2) * (round_ + 1)]
            moments = [torch.rand(tuple(m.shape)) for m in masters]
            for parameter, master, moment in zip(parameters, masters, moments, strict=True):
                chunks.write(parameter, "exp_avg_sq", moment)
                chunks.write(parameter, MASTER, master)
                assert torch.equal(chunks.read(parameter, "exp_avg_sq"), moment)
                chunks.write(parameter, "exp_avg_sq", moment * 2)
                assert torch.equal(chunks.read(parameter, MASTER), master)
            for parameter, master, moment in zip(parameters, masters, moments, strict=True):
                assert torch.equal(chunks.read(parameter, MASTER), master)
                assert torch.equal(chunks.read(parameter, "exp_avg_sq"), moment * 2)
                assert torch.equal(parameter, master.to(torch.bfloat16))
                assert chunks.read(parameter, MASTER).stride() == parameter.stride()
        chunks.write(parameters[0], "exp_avg_sq", torch.zeros(()))
        assert torch.equal(read_slot(chunk, 0, MASTER, ALONE), masters[0])
    finally:
        chunks.close()
