"""Chunks with random values, a queue that updates them, and a disk that fails or records what is done to it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Protocol

import torch
from manager_rig import plan_of
from torch import Tensor

from gemini.chunk import (
    GRADIENT,
    MASTER,
    Buffer,
    Chunk,
    ChunkLayout,
    DiskBackend,
    GradientBuffer,
    Ledger,
    MemoryBuffer,
    MemoryMap,
    NoDevice,
    RamBackend,
    Staging,
    TensorSpec,
    Tier,
    pack,
)
from gemini.errors import OffloadError, OutOfMemory
from gemini.nn.optimizer.kernels.arithmetic import AdamHyper, scalars
from gemini.nn.optimizer.kernels.update import adam_update
from gemini.nn.optimizer.rules.adam_rule import AdamUpdate
from gemini.nn.optimizer.rules.rule import BoundUpdate
from gemini.updates.ticket import Ticket
from gemini.updates.update_pipeline import BLOCK_SETS, ChunkUpdate, Run
from gemini.updates.update_queue import UpdateQueue

BLOCK_NUMEL = 64
BUFFERS = (MASTER, "exp_avg", "exp_avg_sq", GRADIENT)
HYPER = AdamHyper(lr=0.01, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, decoupled=True, bias_correction=True)
ON_DISK = dict.fromkeys(BUFFERS, Tier.DISK)
IN_RAM = dict.fromkeys(BUFFERS, Tier.HOST)
MIXED = {**ON_DISK, MASTER: Tier.HOST, GRADIENT: Tier.HOST}


class Disk(Protocol):
    """Sees what is done to homes on disk."""

    def begin(self, verb: str, chunk: int) -> None:
        """Raise what should go wrong."""

    def end(self, verb: str, chunk: int) -> None: ...


class Faults:
    """Makes the calls with these numbers (counted from 0 over all buffers and threads) fail."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = set(numbers)
        self.always = False
        self.calls = 0
        self._lock = Lock()

    def begin(self, verb: str, chunk: int) -> None:
        with self._lock:
            number, self.calls = self.calls, self.calls + 1
            if self.always or number in self.numbers:
                raise OffloadError(5, f"call {number} fails")

    def end(self, verb: str, chunk: int) -> None:
        pass


class SeenBuffer(Buffer):
    """A disk home of which each read and each write is seen."""

    tier = Tier.DISK
    tensor: Tensor | None = None

    def __init__(self, buffer: Buffer, disk: Disk, chunk: int) -> None:
        self.numel, self.dtype = buffer.numel, buffer.dtype
        self.buffer = buffer
        self._disk, self._chunk = disk, chunk

    @property
    def nbytes(self) -> int:
        return self.buffer.nbytes

    def read(self, start: int, out: Tensor) -> None:
        self._disk.begin("read", self._chunk)
        self.buffer.read(start, out)
        self._disk.end("read", self._chunk)

    def write(self, start: int, source: Tensor) -> None:
        if start % 3:  # a write that fails may have changed any part of its range
            self.buffer.write(start, torch.full_like(source, float("nan")))
        self._disk.begin("write", self._chunk)
        self.buffer.write(start, source)
        self._disk.end("write", self._chunk)


@dataclass
class Rig:
    """Chunks with random values, a queue, and what the values should become."""

    chunks: list[Chunk]
    queue: UpdateQueue
    expected: list[dict[str, Tensor]]
    steps: int = 0

    def submit(self, *indices: int) -> list[Ticket]:
        """One step of these chunks (of all, by default); `expected` follows."""
        self.steps += 1
        at_step = scalars(HYPER, self.steps, grad_scale=0.5)
        updates = []
        for index in indices or range(len(self.chunks)):
            chunk, expected = self.chunks[index], self.expected[index]
            runs = runs_of(chunk.layout, AdamUpdate("fp32", at_step))
            for run in runs:
                *buffers, gradient = (expected[name][run.start : run.stop] for name in BUFFERS)
                adam_update("fp32", buffers, gradient, at_step)
            updates.append(ChunkUpdate(chunk, runs, None))
        return self.queue.submit(updates, NoDevice())

    def check(self) -> None:
        for chunk, expected in zip(self.chunks, self.expected, strict=True):
            for name in BUFFERS:
                assert torch.equal(content(chunk, name), expected[name]), (chunk.index, name)


def runs_of(layout: ChunkLayout, at_step: BoundUpdate) -> tuple[Run, ...]:
    """All slots but those whose key is a multiple of 5, which have no gradient in this step."""
    return tuple(Run(slot.offset, slot.stop, at_step) for slot in layout.slots if slot.key % 5)


def home(chunk: Chunk, name: str) -> Buffer:
    assert chunk.gradient is not None
    return chunk.gradient.buffer if name is GRADIENT else chunk.homes[name]


def content(chunk: Chunk, name: str) -> Tensor:
    buffer = home(chunk, name)
    out = torch.empty(buffer.numel, dtype=buffer.dtype)
    (buffer.buffer if isinstance(buffer, SeenBuffer) else buffer).read(0, out)
    return out


@contextmanager
def rig(
    folder: Path, places: Sequence[dict[str, Tier]], seen_by: Disk, tensors: int = 6, numel: int = 50
) -> Iterator[Rig]:
    generator = torch.Generator().manual_seed(0)
    ledger = Ledger(dict.fromkeys(Tier, 1 << 24), MemoryMap.EMULATED)
    disk, device = DiskBackend(folder, ledger), RamBackend(None)
    layouts = pack([TensorSpec("w", (numel,), (1,), i) for i in range(len(places)) for _ in range(tensors)], 1 << 20)
    chunks, expected = [], []
    for layout, tiers in zip(layouts, places, strict=True):
        buffers: dict[str, Buffer] = {}
        values = {}
        for name in BUFFERS:
            dtype = torch.bfloat16 if name is GRADIENT else torch.float32
            value = torch.randn(layout.numel, generator=generator).abs().to(dtype)
            values[name] = value.clone()
            if tiers[name] is Tier.DISK:
                buffer = disk.allocate(layout.numel, dtype, "test")
                buffer.write(0, value)
                buffers[name] = SeenBuffer(buffer, seen_by, layout.index)
            else:
                buffers[name] = MemoryBuffer(Tier.HOST, value)
        gradient = GradientBuffer(layout, buffers.pop(GRADIENT), device)
        full = torch.empty(layout.numel, dtype=torch.bfloat16)
        chunk = Chunk(plan_of(layout, tiers, torch.bfloat16), buffers, full, gradient)
        chunks.append(chunk)
        expected.append(values)
    queue = UpdateQueue(Staging(BLOCK_SETS * len(BUFFERS), BLOCK_NUMEL))
    try:
        yield Rig(chunks, queue, expected)
    finally:
        queue.close()
        device.close()
        disk.close()


def wait_for_all(tickets: Sequence[Ticket]) -> list[BaseException]:
    """Wait until each is over, trying again as often as needed; the errors on the way."""
    errors: list[BaseException] = []
    for ticket in tickets:
        while True:
            try:
                ticket.wait()
                break
            except (OffloadError, OutOfMemory) as error:
                errors.append(error)
    return errors
