"""The only code that touches a device or a stream: memory of the DEVICE and HOST tiers, and moves between tiers.

Two implementations of one interface. On `RamBackend` the device is RAM: moves out of RAM happen at once, moves from
disk on worker threads. On `CudaBackend` homes are page-locked and moves run on two side streams, ordered with the
compute stream by events (never ``record_stream``, which keeps memory for as long as the allocator likes).
"""

import time
import weakref
from collections import deque
from concurrent.futures import Future
from functools import partial
from threading import Lock
from typing import Protocol

import torch
from torch import Tensor

from .buffer import Buffer, MemoryBuffer
from .staging import Staging
from .tier import Tier
from .workers import end_elsewhere, start_workers
from .write_behind import WriteBehind

FETCH_WORKERS = 2
"""Threads that read from disk: one reads while the other converts."""


class Transfer(Protocol):
    """A move under way."""

    def wait(self) -> None:
        """Return when the data may be used by what is called next; raise what went wrong."""

    def done(self) -> bool:
        """True if `wait` would return at once."""


class Arrived:
    """A move that is over."""

    def wait(self) -> None:
        pass

    def done(self) -> bool:
        return True


class Underway:
    """A move made by a worker thread."""

    def __init__(self, future: "Future[None]") -> None:
        self._future = future

    def wait(self) -> None:
        self._future.result()

    def done(self) -> bool:
        return self._future.done()


class Uploads:
    """Bytes that full copies were filled with and the seconds of doing so, by the tier they came from. Thread-safe."""

    def __init__(self) -> None:
        self.nbytes = dict.fromkeys(Tier, 0)
        self.seconds = dict.fromkeys(Tier, 0.0)
        """0 where moves are not timed: those that a CUDA stream makes."""
        self._lock = Lock()

    def add(self, tier: Tier, nbytes: int, seconds: float) -> None:
        with self._lock:
            self.nbytes[tier] += nbytes
            self.seconds[tier] += seconds


class DeviceBackend(Protocol):
    """What the chunk manager needs of the memory that computes."""

    device: torch.device
    is_ram: bool
    uploads: Uploads

    def home(self, tier: Tier, numel: int, dtype: torch.dtype) -> MemoryBuffer:
        """Zeroed memory for a home on DEVICE or HOST."""

    def grow(self, full: Tensor) -> None:
        """Give a full copy its memory: the same storage object, 0 -> n bytes."""

    def shrink(self, full: Tensor) -> None:
        """Take the memory away again: n -> 0 bytes. Every view sees it go."""

    def upload(self, full: Tensor, source: Buffer, after: "Transfer | None", background: bool) -> Transfer:
        """Fill ``full`` from its home, converting the dtype, once ``after`` (a pending update) is over."""

    def download(self, gradient: Tensor, into: Tensor, accumulate: bool) -> None:
        """Copy (or add) a gradient to memory of another tier; `synchronize` makes it readable."""

    def store(self, gradient: Tensor, into: Buffer, start: int) -> None:
        """Write a flat gradient to a disk home; `synchronize` makes it readable. The gradient may change afterwards.

        Raises
        ------
        OffloadError
            If an earlier one could not be written.
        """

    def synchronize(self) -> None:
        """Wait for all downloads.

        Raises
        ------
        OffloadError
            If one could not be written to disk; the next call tries it again.
        """

    def discard(self) -> None:
        """Wait for all downloads, which nobody will read: what went wrong with them does not matter."""

    def close(self) -> None:
        """End worker threads."""


def fill_from_disk(full: Tensor, source: Buffer, staging: Staging) -> None:
    """Read a disk home into a full copy, in blocks through staging: it is aligned for the disk, full copies are not."""
    block = staging.borrow()
    try:
        typed = block.view(source.dtype)
        for start in range(0, full.numel(), typed.numel()):
            part = full[start : start + typed.numel()]
            source.read(start, typed[: part.numel()])
            part.copy_(typed[: part.numel()])
    finally:
        staging.give_back(block)


class RamBackend:
    """DEVICE is RAM: a box without an accelerator, or an emulated one."""

    device = torch.device("cpu")
    is_ram = True

    def __init__(self, staging: Staging | None, store_staging: Staging | None = None) -> None:
        self.uploads = Uploads()
        self._staging = staging
        self._workers = start_workers(FETCH_WORKERS, "fetch")
        self._store = WriteBehind(store_staging)

    def home(self, tier: Tier, numel: int, dtype: torch.dtype) -> MemoryBuffer:
        return MemoryBuffer(tier, torch.zeros(numel, dtype=dtype))  # calloc: pages come when they are touched

    def grow(self, full: Tensor) -> None:
        full.untyped_storage().resize_(full.numel() * full.element_size())

    def shrink(self, full: Tensor) -> None:
        full.untyped_storage().resize_(0)

    def upload(self, full: Tensor, source: Buffer, after: "Transfer | None", background: bool) -> Transfer:
        if not background and source.tensor is not None:
            self._fill(full, source, after)
            return Arrived()
        return Underway(self._workers.submit(self._fill, full, source, after))

    def _fill(self, full: Tensor, source: Buffer, after: "Transfer | None") -> None:
        if after is not None:
            after.wait()
        begin = time.perf_counter()
        with torch.no_grad(), torch.profiler.record_function("gemini::fetch"):
            if source.tensor is not None:
                full.copy_(source.tensor)
            else:
                assert self._staging is not None
                fill_from_disk(full, source, self._staging)
        self.uploads.add(source.tier, full.nbytes, time.perf_counter() - begin)

    def download(self, gradient: Tensor, into: Tensor, accumulate: bool) -> None:
        into.add_(gradient) if accumulate else into.copy_(gradient)

    def store(self, gradient: Tensor, into: Buffer, start: int) -> None:
        self._store.write(into, start, gradient)

    def synchronize(self) -> None:
        self._store.flush()

    def discard(self) -> None:
        self._store.discard()

    def close(self) -> None:
        end_elsewhere(partial(self._workers.shutdown, wait=True, cancel_futures=True))
        self._store.close()


class _Recorded:
    """A move on a side stream: waiting orders the current stream behind it, without stopping the CPU."""

    def __init__(self, event: torch.cuda.Event, keep: tuple[Tensor, ...]) -> None:
        self._event = event
        self._keep = keep  # memory the copy stream still reads or writes

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)

    def done(self) -> bool:
        return bool(self._event.query())


def _unregister(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)


class CudaBackend:
    """DEVICE is a CUDA device; HOST homes are page-locked where the system allows it."""

    is_ram = False

    def __init__(
        self, device: torch.device, staging: Staging | None, pin_homes: bool, store_staging: Staging | None = None
    ) -> None:
        self.device = device
        self.uploads = Uploads()
        self._staging = staging
        self._pin_homes = pin_homes
        self._to_device = torch.cuda.Stream(device)
        self._to_host = torch.cuda.Stream(device)
        self._leaving: deque[tuple[torch.cuda.Event, Tensor]] = deque()
        self._workers = start_workers(FETCH_WORKERS, "fetch")
        self._store = WriteBehind(store_staging)

    def home(self, tier: Tier, numel: int, dtype: torch.dtype) -> MemoryBuffer:
        if tier is Tier.DEVICE:
            return MemoryBuffer(tier, torch.zeros(numel, dtype=dtype, device=self.device))
        tensor = torch.zeros(numel, dtype=dtype)
        if self._pin_homes and tensor.numel():
            # Registered, not allocated pinned: torch's host allocator rounds each block up to a power of two.
            status = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.numel() * tensor.element_size(), 0)
            self._pin_homes = int(status) == 0  # a low lock limit: go on unpinned, copies are then synchronous
            if self._pin_homes:
                # Before the memory goes back to the system; the storage lives as long as the last view of it.
                weakref.finalize(tensor.untyped_storage(), _unregister, tensor.data_ptr())
        return MemoryBuffer(tier, tensor)

    def grow(self, full: Tensor) -> None:
        full.untyped_storage().resize_(full.numel() * full.element_size())

    def shrink(self, full: Tensor) -> None:
        full.untyped_storage().resize_(0)

    def upload(self, full: Tensor, source: Buffer, after: "Transfer | None", background: bool) -> Transfer:
        # The memory came from the compute stream's pool: what that stream did with it before must be over.
        self._to_device.wait_stream(torch.cuda.current_stream(self.device))
        if source.tensor is None or (after is not None and not after.done()):
            return Underway(self._workers.submit(self._fill_from_worker, full, source, after))
        if after is not None:
            after.wait()
        with torch.cuda.stream(self._to_device), torch.profiler.record_function("gemini::fetch"):
            keep = self._copy_in(full, source.tensor)
            event = torch.cuda.Event()
            event.record(self._to_device)
        self.uploads.add(source.tier, full.nbytes, 0.0)
        return _Recorded(event, keep)

    def _copy_in(self, full: Tensor, home: Tensor) -> tuple[Tensor, ...]:
        if home.dtype is full.dtype:
            full.copy_(home, non_blocking=True)
            return ()
        arrived = home.to(self.device, non_blocking=True)  # convert on the device: the link is not the slow part
        full.copy_(arrived)
        return (arrived,)

    def _fill_from_worker(self, full: Tensor, source: Buffer, after: "Transfer | None") -> None:
        if after is not None:
            after.wait()
        begin = time.perf_counter()
        with torch.no_grad(), torch.cuda.stream(self._to_device):
            if source.tensor is not None:
                self._copy_in(full, source.tensor)
            else:
                assert self._staging is not None
                fill_from_disk(full, source, self._staging)
            self._to_device.synchronize()
        self.uploads.add(source.tier, full.nbytes, time.perf_counter() - begin)

    def download(self, gradient: Tensor, into: Tensor, accumulate: bool) -> None:
        if into.device == gradient.device:
            into.add_(gradient) if accumulate else into.copy_(gradient)
            return
        if accumulate:
            self._wait_for_copies()
            into.add_(gradient.to(into.device))
            return
        self._to_host.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._to_host):
            into.copy_(gradient, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._to_host)
        self._leaving.append((event, gradient))  # the compute stream must not reuse it before the copy is over
        while self._leaving and self._leaving[0][0].query():
            self._leaving.popleft()

    def store(self, gradient: Tensor, into: Buffer, start: int) -> None:
        self._store.write(into, start, gradient)

    def synchronize(self) -> None:
        self._wait_for_copies()
        self._store.flush()

    def discard(self) -> None:
        self._wait_for_copies()
        self._store.discard()

    def _wait_for_copies(self) -> None:
        for event, _ in self._leaving:
            event.synchronize()
        self._leaving.clear()

    def close(self) -> None:
        self._wait_for_copies()
        end_elsewhere(partial(self._workers.shutdown, wait=True, cancel_futures=True))
        self._store.close()
