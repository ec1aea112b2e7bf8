"""Memory of the DEVICE and HOST tiers, and moves between tiers: the interface, and its implementation in RAM.

`DeviceBackend` is the only interface behind which a device, a stream or a worker of moves is touched. On `RamBackend`
the device is RAM: moves out of RAM happen at once, moves from disk on worker threads. `AcceleratorBackend` is the other
one.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from threading import Lock
from typing import Protocol

import torch
from torch import Tensor

from gemini.process_wide import IO_STACK_BYTES
from gemini.torch_private import shown_in_profile

from .buffer import Buffer, MemoryBuffer
from .host_memory import zeroed
from .staging import Staging
from .stored import Decoded
from .tier import Tier
from .workers import close_in_background, start_workers
from .write_behind import WriteBehind

BLOCK_NUMEL = 1 << 16
"""Elements that are decoded at once."""
DEVICE_BLOCK_NUMEL = 1 << 20
"""The same on a device, where a piece is a few kernels."""
SHORT_BYTES = 1 << 19
"""A copy within RAM of at most this many bytes is made at once: a worker takes as long to wake up."""
FETCH_WORKERS = 2
"""Threads that read from disk: one reads while the other converts."""


class Transfer(Protocol):
    """A move under way."""

    def wait(self) -> None:
        """Return when the data may be used by what this thread calls next; raise what went wrong."""

    def done(self) -> bool:
        """True if `wait` would return at once."""

    def rest(self, seconds: float) -> None:
        """Return when no other thread works on it any more, well or not, or after so long. Changes nothing."""


class Arrived:
    """A move that is over."""

    def wait(self) -> None:
        pass

    def done(self) -> bool:
        return True

    def rest(self, seconds: float) -> None:
        pass


class Underway:
    """A move made by a worker thread."""

    def __init__(self, future: "Future[None]") -> None:
        self._future = future

    def wait(self) -> None:
        self._future.result()

    def done(self) -> bool:
        return self._future.done()

    def rest(self, seconds: float) -> None:
        wait([self._future], seconds)


class Postponed:
    """A short move behind an update: the first that waits for it makes it. A worker would take longer to wake up."""

    def __init__(self, work: Callable[[], None], after: Transfer) -> None:
        self._work: Callable[[], None] | None = work
        self._after = after

    def wait(self) -> None:
        if self._work is not None:
            self._work()
            self._work = None

    def done(self) -> bool:
        return self._after.done()

    def rest(self, seconds: float) -> None:
        self._after.rest(seconds)


class Move:
    """A task for a worker that can be called off."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._is_off = False
        self._running = Lock()

    def __call__(self) -> None:
        with self._running:
            if not self._is_off:
                self._work()

    def call_off(self) -> None:
        """Have it not run, or wait until it has."""
        with self._running:
            self._is_off = True


class Caller(Protocol):
    """A thread for which another one works: the stream of its kernels, and its downloads to the host."""

    def stand_in(self) -> AbstractContextManager[None]:
        """Let the kernels of this thread go where the caller's went."""

    def wait_for_downloads(self) -> None:
        """Return when the gradients that had been downloaded by then have arrived."""

    def mark(self) -> Transfer | None:
        """The end of what was put in by those that `stand_in`; None where the host does all itself."""


class NoDevice:
    """A caller whose work is over when it returns."""

    def stand_in(self) -> AbstractContextManager[None]:
        return nullcontext()

    def wait_for_downloads(self) -> None:
        pass

    def mark(self) -> Transfer | None:
        return None


class Uploads:
    """Bytes that full copies were filled with and the seconds of doing so, by the tier they came from. Thread-safe."""

    def __init__(self) -> None:
        self.nbytes = dict.fromkeys(Tier, 0)
        self.seconds = dict.fromkeys(Tier, 0.0)
        """0 where moves are not timed: those that a stream of the device makes."""
        self._lock = Lock()

    def add(self, source: Buffer, nbytes: int, seconds: float) -> None:
        """A full copy of ``nbytes`` was filled; its parts came from where those of the home are."""
        with self._lock:
            for part in source.parts:
                share = part.nbytes / source.nbytes if source.nbytes else 1.0
                self.nbytes[part.tier] += round(nbytes * share)
                self.seconds[part.tier] += seconds * share


class DeviceBackend(Protocol):
    """What the chunk manager needs of the memory that computes."""

    device: torch.device
    is_ram: bool
    uploads: Uploads

    def reserve(self, host_bytes: int) -> None:
        """Take memory for homes on HOST of ``host_bytes`` together (each `padded`), in one piece."""

    def home(self, tier: Tier, numel: int, dtype: torch.dtype) -> MemoryBuffer:
        """Zeroed memory for a home on DEVICE or HOST."""

    def release(self, home: MemoryBuffer) -> None:
        """Have the memory of a home for later ones, once moves from and to it are over. Nobody may hold it any more."""

    def take_over(self) -> None:
        """The calling thread is about to use chunks: what it does comes after all that another stream did with them."""

    def grow(self, full: Tensor) -> None:
        """Give a full copy its memory: the same storage object, 0 -> n bytes."""

    def shrink(self, full: Tensor) -> None:
        """Take the memory away again: n -> 0 bytes. Every view sees it go."""

    def outlast(self, memory: Tensor) -> None:
        """The user may drop a tensor that the calling thread has kernels read."""

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

    def wait_for_stored(self, into: Buffer) -> None:
        """Return when what was stored to a disk home can be read. Any thread may wait; others may store meanwhile.

        Raises
        ------
        OffloadError
            If some of it could not be written. `synchronize` raises it as well.
        """

    def caller(self) -> Caller:
        """The calling thread, for those that are to work for it."""

    def trim(self) -> None:
        """Give memory that is cached but not in use back, because an allocation has failed."""

    def synchronize(self) -> None:
        """Wait for all downloads.

        Raises
        ------
        OffloadError
            If one could not be written to disk; the next call tries it again.
        """

    def discard(self) -> None:
        """Wait for all downloads, whose errors do not matter: they will not be read."""

    def close(self) -> None:
        """End worker threads."""


def fill_in_blocks(full: Tensor, source: Buffer, staging: Staging | None) -> None:
    """Read what is not in memory as it is into a full copy.

    What is on disk comes through staging, which is aligned for that; full copies are not. Values that are decoded need
    neither staging nor, in RAM or where their homes are on the device too, any room but for a piece of them.
    """
    if isinstance(source, Decoded) and (full.device.type == "cpu" or full.device == source.device):
        numel = BLOCK_NUMEL if full.device.type == "cpu" else DEVICE_BLOCK_NUMEL
        for start in range(0, full.numel(), numel):
            source.read(start, full[start : start + numel])
        return
    block = torch.empty(BLOCK_NUMEL) if staging is None else staging.borrow()
    try:
        typed, first = block.view(source.dtype), 0
        for home in source.parts:
            for start in range(0, min(home.numel, full.numel() - first), typed.numel()):
                part = full[first + start : first + min(start + typed.numel(), home.numel)]
                if (there := home.in_memory(start, start + part.numel())) is None:
                    there = typed[: part.numel()]
                    home.read(start, there)
                part.copy_(there)
            first += home.numel
    finally:
        if staging is not None:
            staging.give_back(block)


class RamBackend:
    """DEVICE is RAM: a box without an accelerator, or an emulated one."""

    device = torch.device("cpu")
    is_ram = True

    def __init__(self, staging: Staging | None, store_staging: Staging | None = None) -> None:
        self.uploads = Uploads()
        self._staging = staging
        self._workers = start_workers(FETCH_WORKERS, "fetch", IO_STACK_BYTES)
        self._store = WriteBehind(store_staging)

    def reserve(self, host_bytes: int) -> None:
        pass  # nothing has to be registered with anyone

    def home(self, tier: Tier, numel: int, dtype: torch.dtype) -> MemoryBuffer:
        return MemoryBuffer(tier, zeroed(numel, dtype))

    def release(self, home: MemoryBuffer) -> None:
        pass  # the system has it back when its tensor is gone

    def take_over(self) -> None:
        pass

    def grow(self, full: Tensor) -> None:
        full.untyped_storage().resize_(full.numel() * full.element_size())

    def shrink(self, full: Tensor) -> None:
        full.untyped_storage().resize_(0)

    def outlast(self, memory: Tensor) -> None:
        pass

    def upload(self, full: Tensor, source: Buffer, after: "Transfer | None", background: bool) -> Transfer:
        is_short, fill = source.nbytes <= SHORT_BYTES, partial(self._fill, full, source, after)
        if source.tensor is not None and (is_short or not background):
            if background and after is not None and not after.done():
                return Postponed(fill, after)
            fill()
            return Arrived()
        move = Move(fill)
        try:
            return Underway(self._workers.submit(move))
        except BaseException:
            move.call_off()  # of an interrupt one can't tell whether it came before or after the submission
            raise

    def _fill(self, full: Tensor, source: Buffer, after: "Transfer | None") -> None:
        if after is not None:
            after.wait()
        begin = time.perf_counter()
        with torch.no_grad(), shown_in_profile("gemini::fetch"):
            if source.tensor is not None:
                full.copy_(source.tensor)
            else:
                fill_in_blocks(full, source, self._staging)
        self.uploads.add(source, full.nbytes, time.perf_counter() - begin)

    def download(self, gradient: Tensor, into: Tensor, accumulate: bool) -> None:
        into.add_(gradient) if accumulate else into.copy_(gradient)

    def store(self, gradient: Tensor, into: Buffer, start: int) -> None:
        self._store.write(into, start, gradient)

    def wait_for_stored(self, into: Buffer) -> None:
        self._store.wait_for(into)

    def caller(self) -> Caller:
        return NoDevice()

    def trim(self) -> None:
        pass

    def synchronize(self) -> None:
        self._store.flush()

    def discard(self) -> None:
        self._store.discard()

    def close(self) -> None:
        close_in_background(partial(self._workers.shutdown, wait=True, cancel_futures=True))
        self._store.close()
