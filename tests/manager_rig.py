"""A chunk manager with known values on a fake device that counts every byte."""

from collections.abc import Sequence

import torch
from fakes import FakeBackend, FakeUpdate
from torch import Tensor

from gemini.chunk import (
    GRADIENT,
    MASTER,
    MASTER_LOW,
    SHADOW,
    BufferSpec,
    Chunk,
    ChunkLayout,
    ChunkManager,
    ChunkPlan,
    DiskBackend,
    Ledger,
    MemoryMap,
    Plain,
    SplitBf16,
    TensorSpec,
    Tier,
    WithShadow,
    pack,
    write_slot,
)
from gemini.chunk.content import MasterCodec

NUMEL = 96
FULL_NBYTES = NUMEL * 2  # bf16
TRAINABLE = dict.fromkeys((MASTER, "exp_avg", "exp_avg_sq", GRADIENT), Tier.HOST)
FROZEN = {MASTER: Tier.HOST}
ADAM = (BufferSpec("exp_avg"), BufferSpec("exp_avg_sq"))


def plan_of(
    layout: ChunkLayout,
    tiers: dict[str, Tier],
    dtype: torch.dtype,
    states: tuple[BufferSpec, ...] = ADAM,
    memory: MemoryMap = MemoryMap.EMULATED,
) -> ChunkPlan:
    """The plan of a chunk with these buffers, which tell whether it is trainable and how its masters are kept."""
    is_trainable = GRADIENT in tiers
    codec: MasterCodec = Plain(BufferSpec(MASTER, torch.float32 if is_trainable else dtype))
    if MASTER_LOW in tiers:
        codec = SplitBf16(marks="exp_avg_sq")
    elif SHADOW in tiers:
        codec = WithShadow(BufferSpec(MASTER), dtype)
    is_home = memory.shares(tiers[MASTER], Tier.DEVICE) and codec.specs[0].dtype is dtype
    return ChunkPlan(layout, codec, states if is_trainable else (), tiers, dtype, full_is_home=is_home)


class Rig:
    """Chunks of two parameters each (33 and 20 elements), with known values, bound to parameters."""

    def __init__(
        self,
        homes: Sequence[dict[str, Tier]],
        room: int = 2,
        unified: bool = False,
        disk: DiskBackend | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        layouts = pack([TensorSpec(f"w{i}", (n,), (1,), i // 2) for i, n in enumerate([33, 20] * len(homes))], 100)
        assert all(layout.numel == NUMEL for layout in layouts)
        self.capacity = room * NUMEL * dtype.itemsize
        capacities = {Tier.DEVICE: self.capacity, Tier.HOST: 1 << 20, Tier.DISK: 1 << 20}
        self.memory = MemoryMap.UNIFIED if unified else MemoryMap.EMULATED
        self.ledger = Ledger(capacities, self.memory)
        self.device = FakeBackend(self.capacity if not unified else 1 << 30)
        plans = [
            plan_of(layout, tiers, dtype, memory=self.memory) for layout, tiers in zip(layouts, homes, strict=True)
        ]
        self.manager = ChunkManager(plans, self.ledger, self.device, disk)
        self.chunks = self.manager.chunks
        generator = torch.Generator().manual_seed(0)
        self.values: dict[int, list[Tensor]] = {}
        self.parameters: dict[int, list[Tensor]] = {}
        for chunk in self.chunks:
            self.values[chunk.index] = [torch.randn(slot.shape, generator=generator) for slot in chunk.layout.slots]
            self.parameters[chunk.index] = [torch.empty(slot.shape, dtype=dtype) for slot in chunk.layout.slots]
            for position, value in enumerate(self.values[chunk.index]):
                write_slot(chunk, position, MASTER, value)
                self.manager.bind(self.parameters[chunk.index][position], chunk, position)

    def use(self, chunk: Chunk) -> None:
        self.manager.fetch(chunk)
        self.manager.pin(chunk)
        chunk.unpin()

    def has_values(self, chunk: Chunk) -> bool:
        pairs = zip(self.parameters[chunk.index], self.values[chunk.index], strict=True)
        return all(torch.equal(parameter, value.to(parameter.dtype)) for parameter, value in pairs)

    def is_poisoned(self, chunk: Chunk) -> bool:
        return all(
            bool(p.isnan().all()) and p.untyped_storage().nbytes() == p.element_size() and p.shape == v.shape
            for p, v in zip(self.parameters[chunk.index], self.values[chunk.index], strict=True)
        )

    def used_bytes_agree(self) -> bool:
        return self.ledger.used(Tier.DEVICE) == sum(c.full_nbytes for c in self.chunks if c.is_resident)


def pending(rig: Rig, chunk: Chunk, value: float = 3.0) -> FakeUpdate:
    """An update that writes ``value`` into the master, and through to a full copy, when it is waited for."""

    def work() -> None:
        master = chunk.homes[MASTER]
        master.write(0, torch.full((NUMEL,), value, dtype=master.dtype))
        if chunk.is_resident:
            chunk.full.fill_(value)

    update = FakeUpdate(work)
    chunk.begin_update(update, range(len(chunk.bindings)))
    rig.values[chunk.index] = [torch.full_like(v, value) for v in rig.values[chunk.index]]
    return update
