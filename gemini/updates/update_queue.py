"""Updates the chunks of optimizer steps in the background, in the order submitted; disk homes streamed through staging.

``submit`` returns at once; code that needs a chunk waits for that chunk's ticket. A step is all or nothing for as long
as the process lives: when reading or writing the disk fails, the update stops at that block with nothing lost (what
was computed but not written is kept), the error surfaces at the next wait, which also has it tried again.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..chunk import Caller, Chunk, Staging, close_in_background, pieces, start_workers
from ..errors import OutOfMemory, is_out_of_memory
from ..nn.optimizer.rules.rule import BoundSplitUpdate, BoundUpdate, Form
from ..nn.optimizer.rules.rules import Rules
from ..process_wide import compute_on_this_thread
from ..system_limits import refused_thread
from .commitment import surely
from .ticket import Ticket
from .update_pipeline import PAGE_NUMEL, Block, ChunkUpdate, UpdatePipeline

_NOTHING_LOST = "nothing is lost, and they are tried again; lower host_memory"
_WARM_UP_NUMEL = {True: 1 << 18, False: 1 << 10}
"""On the CPU enough for several threads; on a device only the kernel counts, and memory is full by then."""


def warm_up(
    rules: Rules,
    param_groups: Sequence[Mapping[str, Any]],
    device: torch.device,
    dtype: torch.dtype,
    split_master: bool = False,
) -> None:
    """Do what the first update would do for the first time: compile or load the kernel, start its threads.

    All of that takes memory; where there is none, the compiler ends the process. So it comes before what is left is
    measured and given to chunks.

    Parameters
    ----------
    rules, param_groups
        The optimizer's arithmetic and groups; groups that keep the same states count as one.
    dtype
        Of gradients and full copies.
    split_master
        Masters may be in two halves, too.
    """
    numel = _WARM_UP_NUMEL[device.type == "cpu"]
    known = [(rules.of_group(group), group) for group in reversed(param_groups)]
    elementwise = [(rule, group) for rule, group in known if not rule.is_whole]  # the others' matrices have no one size
    for (rule, slots), group in {(rule, rule.slots(group)): group for rule, group in elementwise}.items():
        master = torch.zeros(numel, dtype=torch.float32, device=device)
        states = [slot.zeros(numel, device) for slot in slots]
        gradient, full = (torch.zeros(numel, dtype=dtype, device=device) for _ in range(2))
        at_step = rule.bind(group, slots)(1, 1.0, None, Form((numel,), (1,)))
        for out in (None, full):
            at_step.apply(master, states, gradient, out)
        if split_master and dtype is torch.bfloat16 and isinstance(at_step, BoundSplitUpdate):
            low = torch.zeros(numel, dtype=torch.int16, device=device)
            at_step.apply_split(full, low, states, gradient)


class Prepared(NamedTuple):
    """The update of a chunk, cut into blocks, and its ticket."""

    ticket: Ticket
    blocks: list[Block]


class UpdateQueue:
    """Runs updates on a background thread, one after the other, also when one of them has to be tried again.

    Parameters
    ----------
    staging
        See `UpdatePipeline`.
    """

    def __init__(self, staging: Staging | None) -> None:
        self._staging = staging
        self._thread = start_workers(1, "update")
        try:
            self._thread.submit(compute_on_this_thread, torch.get_num_threads, torch.set_num_threads).result()
        except RuntimeError as error:
            raise refused_thread(error) from error
        self._pipeline = UpdatePipeline(staging)
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        """What stopped the pipeline. What was submitted since waits behind it."""
        self._is_working = False
        """The thread is at work, and looks for more under the lock before it ends."""
        self._is_closed = False

    def submit(self, updates: Sequence[ChunkUpdate], caller: Caller) -> list[Ticket]:
        """Start updating, in the order given; one ticket per chunk."""
        prepared = [self.prepare(update, caller) for update in updates]
        self.add(prepared)
        return [each.ticket for each in prepared]

    def prepare(self, update: ChunkUpdate, caller: Caller) -> Prepared:
        """All that `add` needs, which then needs no memory but to hand it over."""
        cuts = self._cuts(update)
        ticket = Ticket(self.retry, len(cuts))
        return Prepared(ticket, [Block(update, caller, ticket, *cut) for cut in cuts])

    def add(self, prepared: Sequence[Prepared], *, is_certain: bool = False) -> None:
        """Start updating, in the order given.

        Parameters
        ----------
        is_certain
            Other updates of the step are taken already. If these cannot be handed over, that surfaces at the waits for
            them, which have it tried again; else nothing has been changed then.
        """
        blocks = [block for each in prepared for block in each.blocks]
        with self._lock:
            try:
                self._thread.submit(self._work)  # first: it may fail. It waits for the lock
            except BaseException as error:
                if not is_certain:
                    raise
                if not self._is_working:  # else it comes to these, too
                    self._error = self._error or _as_ours(error)
            if is_certain:
                surely(self._pipeline.add, blocks)
            else:
                self._pipeline.add(blocks)
            if self._error is not None:
                surely(self._fail_all, self._error)

    def arrange(self, chunks: Sequence[Chunk]) -> None:
        """Do what has not begun in this order of chunks."""
        self._pipeline.arrange({chunk: rank for rank, chunk in enumerate(chunks)})

    def _cuts(self, update: ChunkUpdate) -> list[tuple[int, int, int, BoundUpdate, Tensor | None]]:
        gradient = update.chunk.gradient
        streams = any(home.tensor is None for home in update.chunk.homes.values())
        streams = streams or (gradient is not None and gradient.is_file)
        size = self._staging.block_numel if streams and self._staging is not None else update.chunk.layout.numel
        first, boundaries = update.chunk.extent.start, update.chunk.plan.boundaries
        return [
            (first + start, first + stop, offset, run.at_step, run.gradient_of(first + start, first + stop))
            for run in update.runs
            for start, stop, offset in (
                [_whole(run.start - first, run.stop - first)]
                if run.is_whole
                else (
                    piece
                    for part in _divided(run.start - first, run.stop - first, boundaries)
                    for piece in pieces(*part, size)
                )
            )
        ]

    @property
    def can_stream(self) -> bool:
        """True if homes on DISK can be updated."""
        return self._staging is not None

    def retry(self) -> None:
        """Go on where an update failed."""
        with self._lock:
            if self._error is None or self._is_closed:
                return
            self._thread.submit(self._work)  # first, as in `submit`
            self._error = None
            for block in self._pipeline.left:
                block.ticket.reopen()

    def _work(self) -> None:
        """Do all there is. Runs on the update thread."""
        with self._lock:
            if self._error is not None:
                self._fail_all(self._error)
                return
            self._is_working = True
        while True:
            error: BaseException | None = None
            try:
                self._pipeline.run()
            except BaseException as raised:  # whatever it is, it surfaces at the waits
                error = _as_ours(raised)
            with self._lock:
                if error is not None:
                    self._error = error
                    self._fail_all(error)
                if error is not None or not self._pipeline.left:
                    self._is_working = False
                    return

    def _fail_all(self, error: BaseException) -> None:
        for block in self._pipeline.left:
            block.ticket.fail(error)

    def close(self) -> None:
        """End the threads. Pending updates are finished first. A finalizer may call it, so it takes no lock."""
        self._is_closed = True
        close_in_background(self._end)

    def _end(self) -> None:
        self._thread.shutdown(wait=True)
        self._pipeline.close()


def _as_ours(error: BaseException) -> BaseException:
    if is_out_of_memory(error) and not isinstance(error, OutOfMemory):
        return OutOfMemory(f"host tier out of memory in the optimizer's updates ({error!r}); {_NOTHING_LOST}")
    return error


def _whole(start: int, stop: int) -> tuple[int, int, int]:
    """All of a parameter; it begins in staging where it begins in its page."""
    return start, stop, start % PAGE_NUMEL


def _divided(start: int, stop: int, boundaries: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Cut ``[start, stop)`` at boundaries: what is in memory on one side of them needs no staging."""
    return pairwise((start, *(each for each in boundaries if start < each < stop), stop))
