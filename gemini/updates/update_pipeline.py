"""Updates of chunks as one stream of blocks: one is read ahead, one is computed, one is written behind.

::

    add -> waiting --read--> reading --compute--> writing --> over
              ^ in order        |                    |
              '---- what is not done when one fails -'

The stream does not stop between the updates that were added one by one (``update_in_backward`` adds each chunk by
itself). Only what an earlier update of the same chunk has not written yet is not read.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from ..chunk import (
    GRADIENT,
    IO_STACK_BYTES,
    MASTER,
    MASTER_LOW,
    SHADOW,
    Buffer,
    BufferSpec,
    Caller,
    Chunk,
    GradientTensors,
    Staging,
    Tier,
    start_workers,
)
from ..errors import OffloadError, OutOfMemory
from ..nn.optimizer.rules.rule import BoundSplitUpdate, BoundUpdate
from .averages import PIECE_NUMEL, UNCHANGED, BoundAverage
from .commitment import surely
from .ticket import Ticket
from .trial import Trial

BLOCK_SETS = 3
"""Staging for three blocks: one arrives, one is computed, one is written back."""
_READS = 2
"""Blocks that are read or computed at a time."""
IO_WORKERS = 4
"""Buffers that are read or written at a time: what one of them waits for, the disk has from another."""
PAGE_NUMEL = 2048
"""An element at a multiple of this number begins a page of its file, in every dtype."""
_NAMES_SHOWN = 4
_REFRESHED = "full copy"


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring elements of a chunk that take the same step."""

    start: int
    stop: int
    at_step: BoundUpdate
    gradient: Tensor | None = None
    """Their gradient (flat) where it is not in the chunk's buffer."""
    is_whole: bool = False
    """They are one parameter, and the step takes them at once."""

    def gradient_of(self, start: int, stop: int) -> Tensor | None:
        """The part of `gradient` for some of the elements."""
        return None if self.gradient is None else self.gradient.narrow(0, start - self.start, stop - start)


@dataclass(frozen=True, slots=True)
class ChunkUpdate:
    """What to do to one chunk."""

    chunk: Chunk
    runs: tuple[Run, ...]
    out: Tensor | None
    """The full copy to refresh in the same pass, where one exists in the same memory."""
    averages: Mapping[str, BoundAverage] = field(default_factory=dict)
    """What is to follow the masters, by the names of its buffers."""
    trial: Trial | None = None
    """What becomes of its results, where no step has asked for them yet."""


@dataclass(slots=True, eq=False)
class Block:
    """A piece of a run, small enough for staging."""

    update: ChunkUpdate
    caller: Caller
    """Who asked for it."""
    ticket: Ticket
    start: int
    stop: int
    offset: int
    """Of its elements in staging, so that they lie there as they lie in the file."""
    at_step: BoundUpdate
    gradient: Tensor | None = None
    """See `Run`."""
    staged: dict[str, Tensor] = field(default_factory=dict)
    """Borrowed blocks, as the buffers that `Staging` handed out."""
    computed_numel: int = 0
    averaged_numel: int = 0

    @property
    def numel(self) -> int:
        return self.stop - self.start

    @property
    def is_computed(self) -> bool:
        return self.computed_numel == self.numel and (not self.update.averages or self.averaged_numel == self.numel)

    def buffers(self) -> Mapping[str, Buffer]:
        """Where the chunk has what its update takes."""
        if self.update.trial is not None:
            return self.update.trial.sources
        chunk = self.update.chunk
        if self.at_step is UNCHANGED or self.gradient is not None:
            return chunk.homes
        assert chunk.gradient is not None and not isinstance(chunk.gradient, GradientTensors)
        assert chunk.gradient.buffer is not None
        return {**chunk.homes, GRADIENT: chunk.gradient.buffer}

    def to_borrow(self) -> list[str]:
        """What still needs staging."""
        buffers = self.buffers().items()
        return [name for name, home in buffers if name not in self.staged and self._in_memory(name, home) is None]

    @property
    def written(self) -> list[str]:
        """What of its staging the update changes."""
        return [name for name in self.staged if name != GRADIENT]

    @property
    def is_off(self) -> bool:
        """True if nobody wants it any more."""
        return self.update.trial is not None and self.update.trial.is_off

    def gives_up(self) -> bool:
        """Something went wrong with it; False if that has to be told."""
        return self.update.trial is not None and self.update.trial.fail()

    def read(self, name: str) -> None:
        """Fill the staging of one buffer."""
        buffer, trial = self.buffers()[name], self.update.trial
        if trial is not None and name == GRADIENT:
            trial.gradient_arrives()
        buffer.read(self.at_home(name).start, self.tensor(name, buffer))

    def write(self, name: str) -> None:
        """Write the staging of one buffer where it belongs."""
        buffer, trial = self.buffers()[name], self.update.trial
        into = buffer if trial is None else trial.result(name)
        into.write(self.at_home(name).start, self.tensor(name, buffer))

    def follows(self, other: "Block") -> bool:
        """True if it may read what ``other``, of an earlier update, writes."""
        return self.update.chunk is other.update.chunk and self.update is not other.update

    def tensor(self, name: str, buffer: Buffer) -> Tensor:
        """The elements of this block, in memory."""
        if name in self.staged:
            return self.staged[name].view(buffer.dtype)[self.within(name, self.offset, self.offset + self.numel)]
        there = self._in_memory(name, buffer)
        assert there is not None
        return there

    def _in_memory(self, name: str, buffer: Buffer) -> Tensor | None:
        part = self.at_home(name)
        return buffer.in_memory(part.start, part.stop)

    def at_home(self, name: str) -> slice:
        """Where a buffer has the elements of this block."""
        return self.update.chunk.plan.part(name, self.start, self.stop)

    def within(self, name: str, start: int, stop: int) -> slice:
        """What there is for these elements in a tensor that begins with a block of those that share a value."""
        spec = self.update.chunk.specs.get(name)
        return slice(start, stop) if spec is None else spec.part(start, stop)

    def compute(self) -> None:
        """Update the elements that are not updated yet: a retry computes nothing twice."""
        if self.is_computed:
            return
        if self.update.trial is None:
            self.update.chunk.homes.before_change(self.start, self.stop)
        tensors = {name: self.tensor(name, buffer) for name, buffer in self.buffers().items()}
        if self.gradient is not None:
            tensors[GRADIENT] = self.gradient
        if self.update.out is not None:
            tensors[_REFRESHED] = self.update.out[self.start : self.stop]
        step = self.at_step.atomic_numel(tensors[MASTER].device) or self.numel
        while self.computed_numel < self.numel:
            start, stop = self.computed_numel, min(self.computed_numel + step, self.numel)
            self._apply({name: tensor[self.within(name, start, stop)] for name, tensor in tensors.items()})
            self.computed_numel = stop
        while not self.is_computed:
            start, stop = self.averaged_numel, min(self.averaged_numel + PIECE_NUMEL, self.numel)
            self._average({name: tensor[self.within(name, start, stop)] for name, tensor in tensors.items()})
            self.averaged_numel = stop

    def _average(self, tensors: Mapping[str, Tensor]) -> None:
        values = self.update.chunk.plan.codec.decode(tensors)
        for name, average in self.update.averages.items():
            average.apply(tensors[name], values)

    def _apply(self, tensors: Mapping[str, Tensor]) -> None:
        if self.at_step is UNCHANGED:
            return
        at_step, shadow, refreshed = self.at_step, tensors.get(SHADOW), tensors.get(_REFRESHED)
        states = [tensors[spec.name] for spec in self.update.chunk.states]
        if MASTER_LOW in tensors:
            assert isinstance(at_step, BoundSplitUpdate)
            at_step.apply_split(tensors[MASTER], tensors[MASTER_LOW], states, tensors[GRADIENT])
            return
        out = refreshed if shadow is None else shadow
        at_step.apply(tensors[MASTER], states, tensors[GRADIENT], out)
        if shadow is not None and refreshed is not None:
            refreshed.copy_(shadow)


class Moves:
    """The reads or writes of one block, one for each of its buffers on disk, all under way at once.

    Parameters
    ----------
    futures
        Those that were begun.
    error
        Why the others were not.
    """

    def __init__(self, futures: Sequence[Future[None]] = (), error: Exception | None = None) -> None:
        self._futures = futures
        self._error = error

    @property
    def are_over(self) -> bool:
        """True if `finish` would not wait."""
        return all(future.done() for future in self._futures)

    def rest(self) -> None:
        """Wait for all of them, well or not."""
        wait(self._futures)

    def finish(self) -> None:
        """Wait for all of them; raise what went wrong in one."""
        self.rest()
        if self._error is not None:
            raise self._error
        for future in self._futures:
            future.result()

    @property
    def have_failed(self) -> bool:
        """True if one of them went wrong. Waits for all."""
        self.rest()
        return self._error is not None or any(future.exception() is not None for future in self._futures)


_InFlight = tuple[Block, Moves]
"""A block, and what moves it (nothing, where it lies in memory)."""


def buffer_count(states: Sequence[BufferSpec]) -> int:
    """Buffers that the update of a chunk with these states reads: with them, the masters and the gradient."""
    return len(states) + 2


class UpdatePipeline:
    """The stream. Any thread may add to it; one thread at a time runs it.

    Parameters
    ----------
    staging
        Blocks for disk homes, ``BLOCK_SETS`` times as many as the update of a chunk has buffers; None if there are
        none. Nobody else borrows of it.
    """

    def __init__(self, staging: Staging | None) -> None:
        self._staging = staging
        self._disk = start_workers(IO_WORKERS, "update-io", IO_STACK_BYTES)
        self._waiting: deque[Block] = deque()
        self._reading: deque[_InFlight] = deque()
        self._writing: deque[_InFlight] = deque()
        self._lock = threading.RLock()  # entered itself: to leave a `Condition` takes memory, which may have run out
        self._changed = threading.Condition(self._lock)
        """Something was added, or has been read or written."""

    def add(self, blocks: Iterable[Block]) -> None:
        """Put all of these blocks behind the others, or none. They are done if `run` is under way, or called later."""
        with self._lock:
            before = len(self._waiting)
            try:
                self._waiting.extend(blocks)
            except BaseException:
                while len(self._waiting) > before:
                    self._waiting.pop()
                raise
            surely(self._changed.notify_all)

    def arrange(self, ranks: Mapping[Chunk, int]) -> None:
        """Have the updates that have not begun come in the order of these ranks of their chunks.

        Those that failed come first, as they did: they hold staging, which the others may be waiting for.
        """
        with self._lock:
            waiting = sorted(self._waiting, key=lambda each: (not each.staged, ranks.get(each.update.chunk, -1)))
            self._waiting = deque(waiting)
            self._changed.notify_all()

    @property
    def left(self) -> Sequence[Block]:
        """What is not done, in order, while nobody runs it."""
        return self._waiting

    def run(self) -> None:
        """Do all there is. When it raises, nothing is lost, and calling it again goes on where it stopped."""
        try:
            with torch.no_grad():
                while self._advance():
                    pass
        finally:
            self._settle()

    def _advance(self) -> bool:
        """Do what can be done, or wait for something to do; False if nothing is left."""
        while self._writing and _is_over(self._writing):
            self._finish()
        while self._begin_next():
            pass
        if self._reading and _is_over(self._reading):
            self._compute_first()
        elif self._reading or self._writing:
            with self._lock:
                self._changed.wait_for(self._can_advance)
        return bool(self._reading or self._writing or self._waiting)

    def _can_advance(self) -> bool:
        return any(queue and _is_over(queue) for queue in (self._reading, self._writing)) or self._may_begin()

    def _may_begin(self) -> bool:
        while self._waiting and self._waiting[0].is_off:
            self._waiting.popleft()
        if not self._waiting or len(self._reading) == _READS:
            return False
        block, in_flight = self._waiting[0], [other for other, _ in chain(self._reading, self._writing)]
        if needed := len(block.to_borrow()):
            assert self._staging is not None
            # Averages, which nobody has counted on, take blocks as well: then there are fewer sets.
            if sum(bool(other.staged) for other in in_flight) >= BLOCK_SETS or self._staging.free_count < needed:
                return False
        return not any(block.follows(other) for other in in_flight)

    def _begin_next(self) -> bool:
        """Have the next block read; False if none can begin now."""
        with self._lock:  # another thread may be about to arrange what waits
            if not self._may_begin():
                return False
            block = self._waiting[0]
            if block.update.trial is not None and not block.update.trial.begin(block.start):
                return True  # nobody wants it any more
            for name in block.to_borrow():
                assert self._staging is not None
                block.staged[name] = self._staging.borrow()
            # A retry reads nothing that is computed already: staging holds it.
            self._reading.append((block, self._move(Block.read, block, () if block.computed_numel else block.staged)))
            self._waiting.popleft()
        return True

    def _compute_first(self) -> None:
        block, reads = self._reading[0]
        try:
            with _of(block):
                reads.finish()
                block.caller.wait_for_downloads()
                with block.caller.stand_in():
                    block.compute()
        except Exception:
            if not block.gives_up():
                raise
        if block.is_off:
            self._drop(self._reading)
            return
        self._writing.append((block, self._move(Block.write, block, block.written)))
        self._reading.popleft()

    def _finish(self) -> None:
        block, writes = self._writing[0]
        try:
            with _of(block):
                writes.finish()
        except Exception:
            if not block.gives_up():
                raise
            self._drop(self._writing)
            return
        self._writing.popleft()
        self._release(block)
        if block.update.trial is not None:
            block.update.trial.finish(block.start, block.numel)
        on_device = block.update.chunk.tier is Tier.DEVICE
        block.ticket.finish_block(block.caller.mark() if on_device else None)

    def _drop(self, queue: "deque[_InFlight]") -> None:
        """Leave out the first block of a queue, which nobody wants any more."""
        block, moves = queue[0]
        moves.rest()
        surely(self._release, block)
        assert block.update.trial is not None
        surely(block.update.trial.abandon, block.start)
        queue.popleft()

    def _move(self, move: Callable[[Block, str], None], block: Block, names: Iterable[str]) -> Moves:
        futures: list[Future[None]] = []
        try:
            for name in names:
                futures.append(self._disk.submit(move, block, name))
                futures[-1].add_done_callback(self._wake)
        except Exception as error:  # the others are under way: it comes to light once they are over
            return Moves(futures, error)
        return Moves(futures)

    def _wake(self, future: "Future[None]") -> None:
        with self._lock:
            self._changed.notify_all()

    def _release(self, block: Block) -> None:
        while block.staged:
            assert self._staging is not None
            self._staging.give_back(block.staged.popitem()[1])

    def _settle(self) -> None:
        """Wait for what is in flight, and put back what is not done: begun ones with their staging."""
        undone = []
        while self._writing:
            block, writes = self._writing[0]
            if not writes.have_failed:
                self._finish()
            elif block.gives_up():
                self._drop(self._writing)
            else:
                undone.append(block)
                self._writing.popleft()
        while self._reading:
            block, reads = self._reading[0]
            if block.gives_up():
                self._drop(self._reading)
            else:
                reads.rest()
                undone.append(block)
                self._reading.popleft()
        with self._lock:
            self._waiting.extendleft(reversed(undone))
            for block in self._waiting if undone else ():
                if not block.computed_numel:
                    self._release(block)  # the retry reads it again

    def close(self) -> None:
        """End the threads that read and write. Waits for what they do."""
        self._disk.shutdown(wait=True)


def _is_over(queue: "deque[_InFlight]") -> bool:
    return queue[0][1].are_over


@contextmanager
def _of(block: Block) -> Iterator[None]:
    """Errors raised inside say whose update they stopped."""
    try:
        yield
    except Exception as error:
        raise _named(error, block) from error


def _named(error: Exception, block: Block) -> Exception:
    layout = block.update.chunk.layout
    names = [slot.name for slot in layout.slots if slot.offset < block.stop and slot.stop > block.start]
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    where = f"in the optimizer's update of {', '.join(names[:_NAMES_SHOWN])}{more} (chunk {layout.index})"
    if isinstance(error, OffloadError):
        return OffloadError(error.errno, f"{error.strerror}, {where}")
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
        tier = block.update.chunk.tier
        tier = Tier.HOST if tier is Tier.DISK else tier  # its update is computed there
        name = f"{tier.value} tier out of memory {where}: {error}; nothing is lost; lower {tier.value}_memory"
        return OutOfMemory(name)
    return (TypeError if isinstance(error, TypeError) else RuntimeError)(f"{error}, {where}")
