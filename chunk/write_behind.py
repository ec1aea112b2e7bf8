"""Writes to the disk tier that nobody waits for: gradients on their way out of backward."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import RLock

from torch import Tensor

from gemini.process_wide import IO_STACK_BYTES

from .buffer import Buffer
from .origin import Origin
from .staging import Staging, pieces
from .workers import close_in_background, start_workers

STORE_BLOCKS = 3
"""Staging for it: one block is filled while others are written."""


@dataclass(slots=True, eq=False)
class _Write:
    """A piece under way to its home."""

    buffer: Buffer
    first: int
    """The element of ``buffer`` where it begins."""
    piece: Tensor
    """Part of ``block``."""
    block: Tensor
    future: "Future[None] | None" = None
    has_surfaced: bool = False
    """Whether its error has been raised."""

    def start(self, worker: ThreadPoolExecutor) -> None:
        self.future = worker.submit(self.buffer.write, self.first, self.piece)

    def finish(self) -> None:
        """Wait for it; raise what went wrong."""
        assert self.future is not None
        try:
            self.future.result()
        except BaseException:
            self.has_surfaced = True
            raise

    def start_again(self, worker: ThreadPoolExecutor) -> None:
        """Have it tried again if its error has been raised."""
        if self.has_surfaced:
            self.has_surfaced = False
            self.start(worker)


class WriteBehind:
    """Writes to disk homes on a worker thread, through all the blocks of a staging. Callers take turns.

    A write that fails is kept, and tried again by the next `flush`: an error costs nothing but the time.

    Parameters
    ----------
    staging
        All of it is used here. None: there is nothing to write behind, each write is over when it returns.
    """

    def __init__(self, staging: Staging | None) -> None:
        self._staging = staging
        self._worker = None if staging is None else start_workers(1, "store", IO_STACK_BYTES)
        self._writes: deque[_Write] = deque()
        self._origin = Origin()
        self._turn = RLock()
        """Gradients of other ranks are summed by a thread of its own, beside backward."""

    def write(self, buffer: Buffer, start: int, source: Tensor) -> None:
        """Take ``source`` (flat; it may change afterwards) and write it to ``buffer`` from element ``start`` on.

        Raises
        ------
        OffloadError
            If an earlier write failed that has to be over before this one.
        """
        if self._staging is None:
            buffer.write(start, source.cpu())
            return
        with self._turn:
            for begin, end, offset in pieces(start, start + source.numel(), self._staging.block_numel):
                while len(self._writes) >= self._staging.count:
                    self._finish_first()
                self._begin(buffer, begin, source[begin - start : end - start], offset)

    def _begin(self, buffer: Buffer, begin: int, source: Tensor, offset: int) -> None:
        """Have one piece written, which lies ``offset`` elements into a block."""
        assert self._staging is not None and self._worker is not None
        block = self._staging.borrow()
        try:
            piece = block.view(buffer.dtype)[offset : offset + source.numel()]
            piece.copy_(source)
            write = _Write(buffer, begin, piece, block)
            write.start(self._worker)
        except BaseException:
            self._staging.give_back(block)
            raise
        self._writes.append(write)

    def _finish_first(self) -> None:
        self._writes[0].finish()
        self._give_back(self._writes.popleft())

    def _give_back(self, write: _Write) -> None:
        assert self._staging is not None
        self._staging.give_back(write.block)

    def wait_for(self, buffer: Buffer) -> None:
        """Return when what was taken for a buffer is written. Other writes may come meanwhile.

        Raises
        ------
        OffloadError
            If a write failed. `flush` raises it as well, and has it tried again.
        """
        with self._turn:
            futures = [write.future for write in self._writes if write.buffer is buffer]
        for future in futures:
            assert future is not None
            future.result()

    def flush(self) -> None:
        """Have everything written.

        Raises
        ------
        OffloadError
            If a write failed. The next call tries it again.
        """
        if not self._writes:
            return
        self._origin.refuse_elsewhere()
        with self._turn:
            for write in self._writes:
                assert self._worker is not None
                write.start_again(self._worker)
            while self._writes:
                self._finish_first()

    def discard(self) -> None:
        """Wait for what is under way, and forget what failed."""
        with self._turn:
            while self._writes:
                write = self._writes.popleft()
                assert write.future is not None
                write.future.exception()
                self._give_back(write)

    def close(self) -> None:
        """End the thread, once what is under way is over."""
        if self._worker is not None:
            close_in_background(partial(self._worker.shutdown, wait=True))
