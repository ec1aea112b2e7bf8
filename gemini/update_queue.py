"""The background optimizer: chunk updates in the order of their next use, disk homes streamed through staging.

``submit`` returns at once; whoever needs a chunk waits for that chunk's ticket. A step is all or nothing for as long
as the process lives: when reading or writing the disk fails, the update stops at that block with nothing lost (what
was computed but not written is kept), the error surfaces at the next wait, and the wait after that tries again.
"""

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .chunk import Buffer, Chunk, Role, Staging
from .nn.optimizer.arithmetic import AdamScalars
from .nn.optimizer.update import adam_update

UPDATE_ROLES = (Role.MASTER, Role.EXP_AVG, Role.EXP_AVG_SQ, Role.GRADIENT)
BLOCK_SETS = 3
"""Staging for three blocks: one arrives, one is computed, one is written back."""


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring elements of a chunk that take the same step."""

    start: int
    stop: int
    scalars: AdamScalars


@dataclass(frozen=True, slots=True)
class ChunkUpdate:
    """What to do to one chunk."""

    chunk: Chunk
    runs: tuple[Run, ...]
    out: Tensor | None
    """The full copy to refresh in the same pass, where one exists in the same memory."""


class Ticket:
    """The promise that one chunk's update will be over. What `Chunk.update` holds while it is not."""

    def __init__(self, queue: "UpdateQueue") -> None:
        self._queue = queue
        self._over = threading.Event()
        self._error: BaseException | None = None

    def wait(self) -> None:
        """Return when the update is over; raise what stopped it, and have it tried again by the next wait."""
        self._over.wait()
        if self._error is not None:
            error = self._error
            self._queue.retry()
            raise error

    def done(self) -> bool:
        return self._over.is_set()

    def finish(self) -> None:
        self._error = None
        self._over.set()

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._over.set()

    def reopen(self) -> None:
        self._error = None
        self._over.clear()


@dataclass(slots=True, eq=False)
class _Block:
    """A piece of a run, small enough for staging."""

    update: ChunkUpdate
    ticket: Ticket
    start: int
    stop: int
    scalars: AdamScalars
    is_last: bool
    """The ticket is over when this block is."""
    staged: dict[Role, Tensor] = field(default_factory=dict)
    """Borrowed blocks, as the buffers that `Staging` handed out."""
    is_computed: bool = False

    def buffers(self) -> dict[Role, Buffer]:
        chunk = self.update.chunk
        assert chunk.gradient is not None
        return {**chunk.homes, Role.GRADIENT: chunk.gradient.buffer}

    def tensor(self, role: Role, buffer: Buffer) -> Tensor:
        """The elements of this block, in memory."""
        if buffer.tensor is not None:
            return buffer.tensor[self.start : self.stop]
        return self.staged[role].view(buffer.dtype)[: self.stop - self.start]


class UpdateQueue:
    """Runs updates on a background thread, one step after the other.

    Parameters
    ----------
    staging
        Blocks for disk homes, at least ``2 * len(UPDATE_ROLES)``; None if there are none.
    """

    def __init__(self, staging: Staging | None) -> None:
        self._staging = staging
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gemini-memory-update")
        self._disk = ThreadPoolExecutor(2, thread_name_prefix="gemini-memory-update-io")
        self._stopped: list[_Block] = []
        self._lock = threading.Lock()

    def submit(self, updates: Sequence[ChunkUpdate]) -> list[Ticket]:
        """Start updating, in the order given; one ticket per chunk."""
        blocks: list[_Block] = []
        tickets = []
        for update in updates:
            ticket = Ticket(self)
            tickets.append(ticket)
            pieces = self._pieces(update)
            for i, (start, stop, scalars) in enumerate(pieces):
                blocks.append(_Block(update, ticket, start, stop, scalars, i == len(pieces) - 1))
        if blocks:
            self._thread.submit(self._work, blocks)
        return tickets

    def _pieces(self, update: ChunkUpdate) -> list[tuple[int, int, AdamScalars]]:
        assert update.chunk.gradient is not None
        homes = [*update.chunk.homes.values(), update.chunk.gradient.buffer]
        streams = any(home.tensor is None for home in homes)
        size = self._staging.block_numel if streams and self._staging is not None else update.chunk.layout.numel
        return [
            (start, min(start + size, run.stop), run.scalars)
            for run in update.runs
            for start in range(run.start, run.stop, size)
        ]

    def retry(self) -> None:
        """Go on where a failed step stopped."""
        with self._lock:
            blocks, self._stopped = self._stopped, []
        for block in blocks:
            block.ticket.reopen()
        if blocks:
            self._thread.submit(self._work, blocks)

    def _work(self, blocks: list[_Block]) -> None:
        """Read ahead, compute, write behind. Runs on the update thread; only this thread borrows staging."""
        reads: deque[Future[None]] = deque()
        writes: deque[tuple[_Block, Future[None]]] = deque()
        ahead = 0
        error: BaseException | None = None
        i = 0
        with torch.no_grad():
            while i < len(blocks) and error is None:
                try:
                    while ahead < min(i + 2, len(blocks)):
                        self._borrow(blocks[ahead], writes)
                        reads.append(self._disk.submit(self._read, blocks[ahead]))
                        ahead += 1
                    reads.popleft().result()
                    self._compute(blocks[i])
                    writes.append((blocks[i], self._disk.submit(self._write, blocks[i])))
                    i += 1
                    while writes and (len(writes) > 1 or i == len(blocks)):
                        self._finish(writes)
                except BaseException as raised:  # whatever it is, it surfaces at the waits
                    error = raised
        if error is not None:
            self._stop(blocks, reads, writes, error)

    def _borrow(self, block: _Block, writes: deque[tuple[_Block, "Future[None]"]]) -> None:
        roles = [role for role, buffer in block.buffers().items() if buffer.tensor is None and role not in block.staged]
        if roles:
            assert self._staging is not None
            while len(writes) >= BLOCK_SETS - 1:
                self._finish(writes)
            block.staged.update({role: self._staging.borrow() for role in roles})

    def _read(self, block: _Block) -> None:
        if block.is_computed:
            return  # a retry: only the write is missing
        for role in block.staged:
            buffer = block.buffers()[role]
            buffer.read(block.start, block.tensor(role, buffer))

    def _compute(self, block: _Block) -> None:
        if block.is_computed:
            return
        tensors = {role: block.tensor(role, buffer) for role, buffer in block.buffers().items()}
        out = block.update.out
        adam_update(
            *(tensors[role] for role in UPDATE_ROLES),
            block.scalars,
            None if out is None else out[block.start : block.stop],
        )
        block.is_computed = True

    def _write(self, block: _Block) -> None:
        for role in block.staged:
            if role is not Role.GRADIENT:
                buffer = block.buffers()[role]
                buffer.write(block.start, block.tensor(role, buffer))

    def _finish(self, writes: deque[tuple[_Block, "Future[None]"]]) -> None:
        block, future = writes[0]
        future.result()
        writes.popleft()
        self._release(block)
        if block.is_last:
            block.ticket.finish()

    def _release(self, block: _Block) -> None:
        for staged in block.staged.values():
            assert self._staging is not None
            self._staging.give_back(staged)
        block.staged.clear()

    def _stop(
        self,
        blocks: list[_Block],
        reads: deque["Future[None]"],
        writes: deque[tuple[_Block, "Future[None]"]],
        error: BaseException,
    ) -> None:
        """Settle what is in flight, keep what is not written, and tell every chunk that is not done."""
        for read in reads:
            read.exception()
        unwritten = []
        for block, future in writes:
            if future.exception() is None:
                self._release(block)
                if block.is_last:
                    block.ticket.finish()
            else:
                unwritten.append(block)
        written = {id(block) for block, _ in writes if block not in unwritten}
        rest = [b for b in blocks if b in unwritten or (not b.is_computed and id(b) not in written)]
        for block in rest:
            if not block.is_computed:
                self._release(block)  # read again by the retry
        with self._lock:
            self._stopped = rest
        for ticket in {id(b.ticket): b.ticket for b in rest}.values():
            ticket.fail(error)

    def close(self) -> None:
        """End the threads. Pending updates are finished first."""
        self._thread.shutdown(wait=True)
        self._disk.shutdown(wait=True)
