"""What every `DeviceBackend` and every `TierMemory` must do, in one function each for all of them."""

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemini.chunk import Buffer, DeviceBackend, DiskBackend, Ledger, MemoryMap, Tier
from gemini.chunk.memory import Transfer
from gemini.chunk.tier_memory import TierMemory
from gemini.errors import OffloadError, OutOfMemory

NUMEL = 1000
DTYPES = [(torch.float32, torch.bfloat16), (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)]
"""Of a home and of its full copy."""


class Update:
    """A pending update: what `wait` waits for, or raises."""

    def __init__(self, home: Buffer, value: float) -> None:
        self.error: BaseException | None = None
        self.may_go_on = threading.Event()
        self._home, self._value = home, value
        self._lock = threading.Lock()

    def wait(self) -> None:
        assert self.may_go_on.wait(30)
        if self.error is not None:
            raise self.error
        with self._lock:
            self._home.write(0, torch.full((NUMEL,), self._value, dtype=self._home.dtype))

    def done(self) -> bool:
        return False


def check_backend(backend: DeviceBackend, folder: Path) -> None:
    """The contract. A backend needs staging of small blocks, and room for a few homes of `NUMEL` elements."""
    disk = DiskBackend(folder, Ledger({Tier.DISK: 1 << 20}, MemoryMap.EMULATED))
    try:
        _check_homes(backend)
        for home_dtype, full_dtype in DTYPES:
            homes: Sequence[Buffer] = [
                backend.home(Tier.DEVICE, NUMEL, home_dtype),
                backend.home(Tier.HOST, NUMEL, home_dtype),
                disk.allocate(NUMEL, home_dtype, "a home"),
            ]
            for home in homes:
                _check_memory_comes_and_goes(backend, home, full_dtype)
                _check_upload_after_an_update(backend, home, full_dtype)
                _check_upload_after_a_failed_update(backend, home, full_dtype)
        _check_downloads(backend)
        _check_stores(backend, disk)
        backend.close()
        backend.close()
    finally:
        disk.close()


def check_tier_memory(memory: TierMemory, ledger: Ledger) -> None:
    """The contract. The ledger counts nothing else, and has room for some hundred homes of `NUMEL` elements."""
    tier, sizes = memory.tier, (NUMEL, 1, 3 * NUMEL, 0, 50 * NUMEL)

    def counted(numel: int) -> int:
        return -(-numel * 4 // memory.granularity) * memory.granularity

    def filled(numel: int, value: float) -> Buffer:
        home = memory.allocate(numel, torch.float32, "a home")
        assert (home.tier, home.numel, home.dtype) == (tier, numel, torch.float32)
        assert not _values(home).any()
        home.write(0, torch.full((numel,), value))
        return home

    for turn in range(4):  # whatever is freed in between, the room is there again
        homes = {numel: filled(numel, float(numel + turn)) for numel in sizes}
        assert ledger.used(tier) == sum(map(counted, sizes))
        for numel in (sizes[turn], sizes[(turn + 1) % len(sizes)]):
            memory.free(homes.pop(numel))
            homes[numel] = filled(numel, float(numel + turn))
        assert ledger.used(tier) == sum(map(counted, sizes))
        for numel, home in homes.items():
            assert _values(home).eq(numel + turn).all()
            memory.free(home)
        assert ledger.used(tier) == 0

    most = ledger.capacity(tier) // memory.granularity * memory.granularity // 4
    for _ in range(2):
        whole = filled(most, 1.0)
        with pytest.raises(
            OutOfMemory, match=rf"{tier.value} tier out of memory. exp_avg of .* set {tier.value}_memory"
        ):
            memory.allocate(1, torch.float32, "exp_avg of chunk 3")
        assert ledger.used(tier) == counted(most)
        memory.free(whole)
    assert ledger.used(tier) == 0


def _values(home: Buffer) -> Tensor:
    out = torch.ones(home.numel, dtype=home.dtype)
    home.read(0, out)
    return out


def full_copy(backend: DeviceBackend, dtype: torch.dtype) -> Tensor:
    full = torch.empty(NUMEL, dtype=dtype, device=backend.device)
    full.untyped_storage().resize_(0)
    return full


def _check_homes(backend: DeviceBackend) -> None:
    for tier, device in ((Tier.DEVICE, backend.device.type), (Tier.HOST, "cpu")):
        for dtype in (torch.float32, torch.bfloat16):
            home = backend.home(tier, NUMEL, dtype)
            assert home.tier is tier and home.tensor is not None and home.tensor.device.type == device
            assert (home.numel, home.nbytes, home.dtype) == (NUMEL, NUMEL * dtype.itemsize, dtype)
            out = torch.ones(NUMEL, dtype=dtype)
            home.read(0, out)
            assert not out.any()
            value = torch.randn(7).to(dtype)
            home.write(13, value)
            part = torch.empty(7, dtype=dtype)
            home.read(13, part)
            assert torch.equal(part, value)
    assert backend.home(Tier.HOST, 0, torch.float32).nbytes == 0


def _check_memory_comes_and_goes(backend: DeviceBackend, home: Buffer, dtype: torch.dtype) -> None:
    value = torch.randn(NUMEL).to(home.dtype)
    home.write(0, value)
    full = torch.empty(NUMEL, dtype=dtype, device=backend.device)
    view, storage = full[10:20], full.untyped_storage()._cdata
    full.untyped_storage().resize_(0)
    for background in (False, True):
        backend.grow(full)
        assert full.untyped_storage().nbytes() == NUMEL * dtype.itemsize
        transfer = backend.upload(full, home, None, background)
        transfer.wait()
        transfer.wait()
        assert torch.equal(full.cpu(), value.to(dtype)) and torch.equal(view.cpu(), value[10:20].to(dtype))
        assert transfer.done()
        backend.shrink(full)
        assert full.untyped_storage().nbytes() == 0 and full.untyped_storage()._cdata == storage


def _check_upload_after_an_update(backend: DeviceBackend, home: Buffer, dtype: torch.dtype) -> None:
    home.write(0, torch.ones(NUMEL, dtype=home.dtype))
    full, update = full_copy(backend, dtype), Update(home, 3.0)
    backend.grow(full)
    transfer = backend.upload(full, home, update, background=True)
    assert not transfer.done()
    update.may_go_on.set()
    transfer.wait()
    assert torch.equal(full.cpu(), torch.full((NUMEL,), 3.0, dtype=dtype))
    backend.shrink(full)


def _check_upload_after_a_failed_update(backend: DeviceBackend, home: Buffer, dtype: torch.dtype) -> None:
    full, update = full_copy(backend, dtype), Update(home, 3.0)
    update.error = OffloadError(5, "the update failed")
    update.may_go_on.set()
    for background in (False, True):
        backend.grow(full)
        transfer: Transfer | None = None
        with pytest.raises(OffloadError, match="the update failed"):
            transfer = backend.upload(full, home, update, background)
            transfer.wait()
        backend.shrink(full)
        assert full.untyped_storage().nbytes() == 0


def _check_downloads(backend: DeviceBackend) -> None:
    for tier in (Tier.DEVICE, Tier.HOST):
        home = backend.home(tier, NUMEL, torch.bfloat16)
        assert home.tensor is not None
        gradients = [torch.full((NUMEL,), x, dtype=torch.bfloat16, device=backend.device) for x in (256.0, 1.0, 1.0)]
        for i, gradient in enumerate(gradients):
            backend.download(gradient, home.tensor, accumulate=i > 0)
        backend.synchronize()
        assert torch.equal(home.tensor.cpu(), torch.full((NUMEL,), 256.0, dtype=torch.bfloat16))  # in this order
        strided = torch.randn(4, 25, device=backend.device).bfloat16().t()
        into = home.tensor[100:200].as_strided((25, 4), (1, 25), home.tensor.storage_offset() + 100)
        backend.download(strided, into, accumulate=False)
        backend.synchronize()
        assert torch.equal(into.cpu(), strided.cpu())


def _check_stores(backend: DeviceBackend, disk: DiskBackend) -> None:
    home = disk.allocate(NUMEL, torch.bfloat16, "a gradient")
    expected = torch.zeros(NUMEL, dtype=torch.bfloat16)
    for start, stop in ((0, 1), (1, 700), (700, NUMEL)):
        gradient = torch.randn(stop - start, device=backend.device).bfloat16()
        expected[start:stop] = gradient.cpu()
        backend.store(gradient, home, start)
        gradient.fill_(float("nan"))  # it may change at once
    backend.synchronize()
    out = torch.empty_like(expected)
    home.read(0, out)
    assert torch.equal(out, expected)
    backend.store(expected.to(backend.device), home, 0)
    backend.discard()
