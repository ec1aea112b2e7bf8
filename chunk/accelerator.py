"""DEVICE is an accelerator: moves on two lanes beside the compute stream, ordered by marks.

No ``record_stream`` but for tensors of the user's (it keeps memory for as long as the allocator likes), and nothing on
the way of a unit that waits for the device: the training thread only says what has to come after what.

::

    to device   ---- chunk 4 --------- chunk 5 -----          follows the compute stream, because the memory of a full
                       ^                 |                    copy is free only behind what used it before
    compute     -- unit 2 --- unit 3 --- v unit 4 ---         is held until its chunk has arrived
                       |                   |
    to host            '-> gradients ------'-> gradients      the CPU waits for these before it updates their chunks

The compute stream is the current one of the thread that calls: it need not be the same in each call. One that only
reads parameters (to log norms, say) makes chunks come and go, which training does not expect of it. So whichever is the
next to use chunks waits for the one before, and memory of full copies goes back to the stream that it was taken in when
that has waited for the stream that gives it back.

The optimizer's updates of homes on DEVICE are kernels, too. Another thread launches them, later than they are asked
for, in the stream of the thread that asked. An update that is over has been launched, no more: what waits for it is
held behind these kernels, in the stream that the waiting is done in. For a fetch that is the lane.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from threading import Lock

import torch
from torch import Tensor

from gemini.torch_private import shown_in_profile

from .accelerator_driver import AcceleratorDriver, Lane, Mark
from .buffer import Buffer, MemoryBuffer
from .conversion import SCRATCH_NUMEL, conversion_pieces
from .host_arena import HostArena
from .memory import FETCH_WORKERS, Caller, Transfer, Underway, Uploads, fill_in_blocks
from .staging import Staging
from .tier import Tier
from .workers import close_in_background, start_workers
from .write_behind import WriteBehind

ADDED_NUMEL = 1 << 20
"""Elements of a gradient that are added at a time to what is on the host already: it comes to the device for that."""


class _OnLane:
    """A move on a lane, or an update in a stream: waiting holds the current stream, not the CPU."""

    def __init__(self, mark: Mark) -> None:
        self._mark = mark

    def wait(self) -> None:
        self._mark.hold()

    def done(self) -> bool:
        return self._mark.reached()

    def rest(self, seconds: float) -> None:
        pass  # no thread works on it


class _Caller:
    """A thread that has gone on since (a `Caller`)."""

    def __init__(self, stream: Lane, downloads: Mark | None) -> None:
        self._stream = stream
        self._downloads = downloads

    def stand_in(self) -> AbstractContextManager[None]:
        return self._stream.entered()

    def wait_for_downloads(self) -> None:
        if self._downloads is not None:
            self._downloads.wait()

    def mark(self) -> Transfer:
        return _OnLane(self._stream.mark())


class AcceleratorBackend:
    """A `DeviceBackend` on an accelerator; homes on HOST are page-locked where the system allows it.

    Parameters
    ----------
    driver
        The driver of the device.
    staging, store_staging
        Blocks of RAM for reading and writing DISK homes; None if there are none.
    pin_homes
        Page-lock the homes on HOST. Copies from and to ordinary RAM make the training thread wait.
    """

    is_ram = False

    def __init__(
        self,
        driver: AcceleratorDriver,
        staging: Staging | None,
        pin_homes: bool,
        store_staging: Staging | None = None,
    ) -> None:
        self.device = driver.device
        self.uploads = Uploads()
        self._driver = driver
        self._staging = staging
        self._arena = HostArena(partial(driver.host_block, pin=pin_homes))
        self._to_device = self._driver.lane()
        self._to_host = self._driver.lane()
        self._scratch = torch.empty(SCRATCH_NUMEL * 4, dtype=torch.uint8, device=self.device)
        """Where the last elements of a master arrive. Nothing else is taken beside the full copies."""
        self._uploading = Lock()
        """Held while a chunk is put into the lane, which threads do, too."""
        self._leaving: deque[tuple[Mark, tuple[Tensor, ...]]] = deque()
        """Memory that copies to the host still read. The compute stream must not reuse it before."""
        self._workers = start_workers(FETCH_WORKERS, "fetch")
        self._store = WriteBehind(store_staging)
        self._last_user = self._driver.current()
        """The stream that has used chunks last."""
        self._grown_in: dict[int, Lane] = {}
        """id of a full copy that has memory -> the stream that the memory was taken in, and goes back to."""

    # -- streams

    def take_over(self) -> None:
        current = self._driver.current()
        if current != self._last_user:
            self._last_user.mark().hold()
            self._last_user = current

    # -- memory

    def reserve(self, host_bytes: int) -> None:
        self._arena.reserve(host_bytes)

    def home(self, tier: Tier, numel: int, dtype: torch.dtype) -> MemoryBuffer:
        if tier is Tier.DEVICE:
            return MemoryBuffer(tier, torch.zeros(numel, dtype=dtype, device=self.device))
        return MemoryBuffer(tier, self._arena.take(numel, dtype))

    def release(self, home: MemoryBuffer) -> None:
        if home.tier is Tier.HOST and home.tensor is not None:  # on DEVICE torch's allocator keeps the order of streams
            for lane in (self._to_device, self._to_host):
                lane.mark().wait()
            self._arena.give_back(home.tensor)

    def grow(self, full: Tensor) -> None:
        self._driver.allocate(full)
        self._grown_in[id(full)] = self._driver.current()

    def shrink(self, full: Tensor) -> None:
        grown_in = self._grown_in.pop(id(full), None)
        if grown_in is not None and grown_in != self._driver.current():
            grown_in.follow_current()
        self._driver.release(full)

    def outlast(self, memory: Tensor) -> None:
        if not self._driver.is_host(memory):
            self._driver.outlast(memory)

    def caller(self) -> Caller:
        return _Caller(self._driver.current(), self._leaving[-1][0] if self._leaving else None)

    def trim(self) -> None:
        self._driver.trim()

    # -- to the device

    def upload(self, full: Tensor, source: Buffer, after: "Transfer | None", background: bool) -> Transfer:
        with self._uploading:
            self._to_device.follow_current()
        if source.tensor is None or (after is not None and not after.done()):
            return Underway(self._workers.submit(self._fill_from_worker, full, source, after))
        self._wait_in_lane(after)
        with shown_in_profile("gemini::fetch"):
            mark = self._put_upload(full, source.tensor)
        self.uploads.add(source, full.nbytes, 0.0)
        return _OnLane(mark)

    def _wait_in_lane(self, after: "Transfer | None") -> None:
        if after is not None:
            with self._to_device.entered():
                after.wait()

    def _put_upload(self, full: Tensor, home: Tensor) -> Mark:
        with self._uploading:
            return self._put(partial(self._fill, full, home))

    def _put(self, fill: Callable[[], None]) -> Mark:
        try:
            self._to_device.put(fill)
        except BaseException:
            self._to_device.mark().wait()  # what has been put in writes to memory that will be another's
            raise
        return self._to_device.mark()

    def _fill(self, full: Tensor, home: Tensor) -> None:
        if home.dtype is full.dtype or not self._driver.is_host(home):
            full.copy_(home, non_blocking=True)
            return
        for piece in conversion_pieces(full.numel(), home.dtype.itemsize // full.dtype.itemsize):
            room = self._scratch if piece.room is None else full[piece.room :].view(torch.uint8)
            arrived = room[: (piece.stop - piece.start) * home.dtype.itemsize].view(home.dtype)
            arrived.copy_(home[piece.start : piece.stop], non_blocking=True)
            full[piece.start : piece.stop].copy_(arrived)

    def _fill_from_worker(self, full: Tensor, source: Buffer, after: "Transfer | None") -> None:
        self._wait_in_lane(after)
        begin = time.perf_counter()
        if source.tensor is not None:
            self._put_upload(full, source.tensor).wait()
        else:
            self._put(partial(fill_in_blocks, full, source, self._staging)).wait()
        self.uploads.add(source, full.nbytes, time.perf_counter() - begin)

    # -- to the host

    def download(self, gradient: Tensor, into: Tensor, accumulate: bool) -> None:
        if not self._driver.is_host(into):
            came_from_ranks = self._driver.is_host(gradient)
            gradient = gradient.to(into.device)
            into.add_(gradient) if accumulate else into.copy_(gradient)
            if came_from_ranks:  # on the thread that sums, in its own stream: it is there when this returns
                self._driver.current().mark().wait()
            return
        if self._driver.is_host(gradient):
            self._wait_for_copies()  # the host copies at once: what is on its way would come on top
            into.add_(gradient) if accumulate else into.copy_(gradient)
            return
        self._to_host.follow_current()
        self._to_host.put(partial(self._leave, gradient, into, accumulate))
        self._leaving.append((self._to_host.mark(), (gradient,)))
        while self._leaving and self._leaving[0][0].reached():
            self._leaving.popleft()

    def _leave(self, gradient: Tensor, into: Tensor, accumulate: bool) -> None:
        if not accumulate:
            into.copy_(gradient, non_blocking=True)
            return
        # On the device and in this lane, behind the copy that filled the home: nothing waits for the CPU.
        for part, home in _parts(gradient, into):
            home.copy_(home.to(self.device, non_blocking=True, copy=True).add_(part), non_blocking=True)

    def store(self, gradient: Tensor, into: Buffer, start: int) -> None:
        self._store.write(into, start, gradient)

    def wait_for_stored(self, into: Buffer) -> None:
        self._store.wait_for(into)

    def synchronize(self) -> None:
        self._wait_for_copies()
        self._store.flush()

    def discard(self) -> None:
        self._wait_for_copies()
        self._store.discard()

    def _wait_for_copies(self) -> None:
        for mark, _ in self._leaving:
            mark.wait()
        self._leaving.clear()

    def close(self) -> None:
        self._wait_for_copies()
        close_in_background(partial(self._workers.shutdown, wait=True, cancel_futures=True))
        self._to_device.mark().wait()  # the memory of what has been fetched, and not been used, may go after this
        self._store.close()


def _parts(gradient: Tensor, into: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of both, small where they lie in memory alike and without gaps."""
    dense = torch.empty_like(into, device="meta").stride()
    if not gradient.stride() == into.stride() == dense:
        yield gradient, into
        return
    flat = (gradient.as_strided((gradient.numel(),), (1,)), into.as_strided((into.numel(),), (1,)))
    yield from zip(*(tensor.split(ADDED_NUMEL) for tensor in flat), strict=True)
