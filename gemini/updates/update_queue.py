"""The background optimizer: chunk updates in the order of their next use, disk homes streamed through staging.

``submit`` returns at once; whoever needs a chunk waits for that chunk's ticket. A step is all or nothing for as long
as the process lives: when reading or writing the disk fails, the update stops at that block with nothing lost (what
was computed but not written is kept), the error surfaces at the next wait, which also has it tried again.
"""

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..chunk import IO_STACK_BYTES, STATE_ROLES, Buffer, Chunk, Role, Staging, end_elsewhere, pieces, start_workers
from ..errors import OffloadError, OutOfMemory
from ..nn.optimizer.kernel_pool import keep_to_one_thread
from ..nn.optimizer.rule import AtStep, Rule

BLOCK_SETS = 3
"""Staging for three blocks: one arrives, one is computed, one is written back."""
_NAMES_SHOWN = 4
_WARM_UP_NUMEL = 1 << 18
"""Enough for several threads."""


_REFRESHED = "full copy"


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring elements of a chunk that take the same step."""

    start: int
    stop: int
    at_step: AtStep


@dataclass(frozen=True, slots=True)
class ChunkUpdate:
    """What to do to one chunk."""

    chunk: Chunk
    runs: tuple[Run, ...]
    out: Tensor | None
    """The full copy to refresh in the same pass, where one exists in the same memory."""


class Ticket:
    """The promise that one chunk's update will be over. What `Chunk.update` holds while it is not."""

    def __init__(self, queue: "UpdateQueue", block_count: int) -> None:
        self._queue = queue
        self._blocks_left = block_count
        self._changed = threading.Condition()
        self._error: BaseException | None = None

    def wait(self) -> None:
        """Return when the update is over; raise what stopped it, and have it tried again meanwhile."""
        with self._changed:
            # A condition, not an event: a waiter that wakes after another has begun the retry must wait for that.
            self._changed.wait_for(self.done)
            error = self._error
        if error is not None:
            self._queue.retry()
            raise error

    def done(self) -> bool:
        """True if `wait` would return or raise at once."""
        return self.is_over or self._error is not None

    @property
    def is_over(self) -> bool:
        """True if nothing of it is left to do."""
        return self._blocks_left == 0

    def finish_block(self) -> None:
        with self._changed:
            self._blocks_left -= 1
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def reopen(self) -> None:
        with self._changed:
            self._error = None


@dataclass(slots=True, eq=False)
class _Block:
    """A piece of a run, small enough for staging."""

    update: ChunkUpdate
    ticket: Ticket
    start: int
    stop: int
    offset: int
    """Of its elements in staging, so that they lie there as they lie in the file."""
    at_step: AtStep
    staged: dict[Role, Tensor] = field(default_factory=dict)
    """Borrowed blocks, as the buffers that `Staging` handed out."""
    computed_numel: int = 0
    is_written: bool = False

    @property
    def numel(self) -> int:
        return self.stop - self.start

    @property
    def is_computed(self) -> bool:
        return self.computed_numel == self.numel

    def buffers(self) -> dict[Role, Buffer]:
        chunk = self.update.chunk
        assert chunk.gradient is not None and chunk.gradient.buffer is not None
        return {**chunk.homes, Role.GRADIENT: chunk.gradient.buffer}

    def tensor(self, role: Role, buffer: Buffer) -> Tensor:
        """The elements of this block, in memory."""
        if buffer.tensor is not None:
            return buffer.tensor[self.part(role, self.start, self.stop)]
        return self.staged[role].view(buffer.dtype)[self.part(role, self.offset, self.offset + self.numel)]

    def part(self, role: Role | str, start: int, stop: int) -> slice:
        """What a role has for these elements; they begin with a block of those that share a value."""
        state = self.update.chunk.states.get(role) if isinstance(role, Role) else None
        return slice(start, stop) if state is None else slice(start // state.block_numel, state.numel(stop))


def update_roles(state_count: int) -> tuple[Role, ...]:
    """What the update of a chunk with so many optimizer states reads."""
    return (Role.MASTER, *STATE_ROLES[:state_count], Role.GRADIENT)


def warm_up(rule: Rule, param_groups: Sequence[Mapping[str, Any]], device: torch.device, dtype: torch.dtype) -> None:
    """Do what the first update would do for the first time: compile or load the kernel, start its threads.

    All of that takes memory; where there is none, the compiler ends the process. So it comes before what is left is
    measured and given to chunks.

    Parameters
    ----------
    rule, param_groups
        The optimizer's arithmetic and groups; groups that keep the same states count as one.
    dtype
        Of gradients and full copies.
    """
    for slots, group in {rule.slots(group): group for group in reversed(param_groups)}.items():
        master = torch.zeros(_WARM_UP_NUMEL, device=device)
        states = [slot.zeros(_WARM_UP_NUMEL, device) for slot in slots]
        gradient, full = (torch.zeros(_WARM_UP_NUMEL, dtype=dtype, device=device) for _ in range(2))
        for out in (None, full):
            rule.of_group(group, slots)(1, 1.0).apply(master, states, gradient, out)


class UpdateQueue:
    """Runs updates on a background thread, one step after the other, also when one of them has to be tried again.

    Parameters
    ----------
    staging
        Blocks for disk homes, ``BLOCK_SETS`` times as many as the update of a chunk has roles; None if there are none.
    """

    def __init__(self, staging: Staging | None) -> None:
        self._staging = staging
        self._thread = start_workers(1, "update")
        self._thread.submit(keep_to_one_thread).result()
        self._disk = start_workers(2, "update-io", IO_STACK_BYTES)
        self._lock = threading.Lock()
        self._steps: deque[list[_Block]] = deque()
        """What waits to be done. One step may read what the one before writes, so they are never mixed."""
        self._error: BaseException | None = None
        """What stopped the first of them. The others wait behind it: staging may hold what it has not written."""
        self._is_closed = False

    def submit(self, updates: Sequence[ChunkUpdate]) -> list[Ticket]:
        """Start updating, in the order given; one ticket per chunk."""
        blocks: list[_Block] = []
        tickets = []
        for update in updates:
            cuts = self._cuts(update)
            ticket = Ticket(self, len(cuts))
            tickets.append(ticket)
            blocks += [_Block(update, ticket, *cut) for cut in cuts]
        with self._lock:
            self._steps.append(blocks)
            self._thread.submit(self._work)
        return tickets

    def _cuts(self, update: ChunkUpdate) -> list[tuple[int, int, int, AtStep]]:
        assert update.chunk.gradient is not None and update.chunk.gradient.buffer is not None
        homes = [*update.chunk.homes.values(), update.chunk.gradient.buffer]
        streams = any(home.tensor is None for home in homes)
        size = self._staging.block_numel if streams and self._staging is not None else update.chunk.layout.numel
        return [(*cut, run.at_step) for run in update.runs for cut in pieces(run.start, run.stop, size)]

    def retry(self) -> None:
        """Go on where a failed step stopped."""
        with self._lock:
            if self._error is None or self._is_closed:
                return
            self._error = None
            for block in chain(*self._steps):
                block.ticket.reopen()
            self._thread.submit(self._work)

    def _work(self) -> None:
        """Do all steps there are. Runs on the update thread; only this thread borrows staging."""
        while True:
            with self._lock:
                if self._error is not None:
                    self._fail_all(self._error)
                    return
                if not self._steps:
                    return
                blocks = self._steps.popleft()
            try:
                self._run(blocks)
            except BaseException as error:  # whatever it is, it surfaces at the waits
                with self._lock:
                    self._error = error
                    self._steps.appendleft(blocks)
                    self._fail_all(error)
                return

    def _fail_all(self, error: BaseException) -> None:
        for block in chain(*self._steps):
            block.ticket.fail(error)

    def _run(self, blocks: list[_Block]) -> None:
        """Read ahead, compute, write behind. When it raises, what is left in ``blocks`` is not done, in order."""
        reads: deque[Future[None]] = deque()
        writes: deque[tuple[_Block, Future[None]]] = deque()
        ahead = 0
        try:
            with torch.no_grad():
                for i, block in enumerate(blocks):
                    while ahead < min(i + 2, len(blocks)):
                        self._borrow(blocks[ahead], writes)
                        reads.append(self._disk.submit(self._read, blocks[ahead]))
                        ahead += 1
                    with _of(block):
                        reads.popleft().result()
                        self._compute(block)
                    writes.append((block, self._disk.submit(self._write, block)))
                    while len(writes) > 1:
                        self._finish(writes)
                while writes:
                    self._finish(writes)
        finally:
            self._settle(blocks, reads, writes)

    def _borrow(self, block: _Block, writes: deque[tuple[_Block, "Future[None]"]]) -> None:
        roles = [role for role, buffer in block.buffers().items() if buffer.tensor is None and role not in block.staged]
        if roles:
            assert self._staging is not None
            while len(writes) >= BLOCK_SETS - 1:
                self._finish(writes)
            block.staged.update({role: self._staging.borrow() for role in roles})

    def _read(self, block: _Block) -> None:
        if block.computed_numel:
            return  # a retry: staging holds what was computed
        for role in block.staged:
            buffer = block.buffers()[role]
            buffer.read(block.part(role, block.start, block.stop).start, block.tensor(role, buffer))

    def _compute(self, block: _Block) -> None:
        if block.is_computed:
            return
        tensors: dict[Role | str, Tensor] = {r: block.tensor(r, buffer) for r, buffer in block.buffers().items()}
        if block.update.out is not None:
            tensors[_REFRESHED] = block.update.out[block.start : block.stop]
        step = block.at_step.atomic_numel(tensors[Role.MASTER].device) or block.numel
        while not block.is_computed:  # what one call wrote is not computed again by a retry
            stop = min(block.computed_numel + step, block.numel)
            done = block.computed_numel
            _update(block.at_step, {role: t[block.part(role, done, stop)] for role, t in tensors.items()})
            block.computed_numel = stop

    def _write(self, block: _Block) -> None:
        for role in block.staged:
            if role is not Role.GRADIENT:
                buffer = block.buffers()[role]
                buffer.write(block.part(role, block.start, block.stop).start, block.tensor(role, buffer))

    def _finish(self, writes: deque[tuple[_Block, "Future[None]"]]) -> None:
        block, future = writes[0]
        with _of(block):
            future.result()
        writes.popleft()
        self._release(block)
        block.is_written = True
        block.ticket.finish_block()

    def _release(self, block: _Block) -> None:
        for staged in block.staged.values():
            assert self._staging is not None
            self._staging.give_back(staged)
        block.staged.clear()

    def _settle(
        self,
        blocks: list[_Block],
        reads: deque["Future[None]"],
        writes: deque[tuple[_Block, "Future[None]"]],
    ) -> None:
        """Wait for what is in flight, and keep of ``blocks`` what is not done: begun ones with their staging."""
        for read in reads:
            read.exception()
        while writes:
            if writes[0][1].exception() is None:
                self._finish(writes)
            else:
                writes.popleft()
        blocks[:] = [block for block in blocks if not block.is_written]
        for block in blocks:
            if not block.computed_numel:
                self._release(block)  # the retry reads it again

    def close(self) -> None:
        """End the threads. Pending updates are finished first. A finalizer may call it, so it takes no lock."""
        self._is_closed = True
        end_elsewhere(self._end)

    def _end(self) -> None:
        self._thread.shutdown(wait=True)
        self._disk.shutdown(wait=True)


def _update(at_step: AtStep, tensors: Mapping[Role | str, Tensor]) -> None:
    shadow, refreshed = tensors.get(Role.SHADOW), tensors.get(_REFRESHED)
    states = [tensors[role] for role in STATE_ROLES if role in tensors]
    out = refreshed if shadow is None else shadow
    at_step.apply(tensors[Role.MASTER], states, tensors[Role.GRADIENT], out)
    if shadow is not None and refreshed is not None:
        refreshed.copy_(shadow)


@contextmanager
def _of(block: _Block) -> Iterator[None]:
    """Errors raised inside say whose update they stopped."""
    try:
        yield
    except Exception as error:
        raise _named(error, block) from error


def _named(error: Exception, block: _Block) -> Exception:
    layout = block.update.chunk.layout
    names = [slot.name for slot in layout.slots if slot.offset < block.stop and slot.stop > block.start]
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    where = f"in the optimizer's update of {', '.join(names[:_NAMES_SHOWN])}{more} (chunk {layout.index})"
    if isinstance(error, OffloadError):
        return OffloadError(error.errno, f"{error.strerror}, {where}")
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
        return OutOfMemory(f"host tier out of memory {where}: {error}; nothing is lost; lower host_memory")
    return (TypeError if isinstance(error, TypeError) else RuntimeError)(f"{error}, {where}")
