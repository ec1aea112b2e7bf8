"""Snapshots of a model's chunks, and the thread that reads them while training goes on."""

import logging
import threading
from collections.abc import Callable, Collection, Mapping

import torch

from gemini.errors import OutOfMemory
from gemini.process_wide import IO_STACK_BYTES, compute_on_this_thread, give_way, small_stacks

from .chunk import Chunk
from .full_copies import FullCopies
from .ledger import Ledger
from .memory import DeviceBackend
from .origin import Origin
from .snapshot import Snapshot
from .tier import Tier

logger = logging.getLogger(__name__)

Wanted = Mapping[Chunk, Mapping[int, Collection[str]]]
"""Names of values (masters, or a state) by the position of their parameter and its chunk."""


class Snapshots:
    """Takes snapshots, one at a time, each for one piece of work on a thread of its own.

    The thread gives way to those that train. It is no daemon: the interpreter waits for it. What goes wrong on it is
    raised by the next `wait` or `raise_fault`.

    Parameters
    ----------
    full_copies, device, ledger
        Brings edits home, computes, and counts copies.
    limit_bytes
        What copies may take; None: half of what HOST has free when a snapshot is made.
    """

    def __init__(
        self, full_copies: FullCopies, device: DeviceBackend, ledger: Ledger, limit_bytes: int | None = None
    ) -> None:
        self._full_copies = full_copies
        self._device = device
        self._ledger = ledger
        self._limit_bytes = limit_bytes
        self._origin = Origin()
        self._changed = threading.Condition()
        self._current: Snapshot | None = None
        self._reader = 0
        """Ident of the thread that does the work."""
        self._fault: BaseException | None = None

    @property
    def of_reader(self) -> Snapshot | None:
        """The snapshot, if this is asked on the thread that does the work."""
        return self._current if self._reader == threading.get_ident() else None

    @property
    def nbytes(self) -> int:
        """What copies take now."""
        current = self._current
        return 0 if current is None else current.nbytes

    @property
    def is_under_way(self) -> bool:
        """True if a snapshot is being read in this process."""
        return self._current is not None and self._origin.is_here

    @property
    def limit_bytes(self) -> int:
        """What copies may take of a snapshot that is made now."""
        return self._ledger.free(Tier.HOST) // 2 if self._limit_bytes is None else self._limit_bytes

    def begin(self, wanted: Wanted, work: Callable[[], None], held_bytes: int = 0) -> None:
        """Have ``work`` done, which finds these values as they are now (`of_reader`), and return.

        Parameters
        ----------
        wanted
            What the work reads, each once.
        held_bytes
            What the work holds in RAM besides; it counts as copies do.

        Raises
        ------
        OutOfMemory
            If HOST has no room, or the system refuses a thread. The work has not begun then.
        Exception
            What went wrong in the work before it, see `wait`; or with an update that is under way.
        """
        self.wait()
        for chunk in wanted:
            self._full_copies.quiet(chunk)
        self._device.synchronize()
        snapshot = Snapshot(wanted, self._ledger, self.limit_bytes, held_bytes)
        self._current = snapshot
        thread = threading.Thread(target=self._run, args=(work, snapshot), name="gemini-memory-save", daemon=False)
        try:
            with small_stacks(IO_STACK_BYTES):
                thread.start()
        except RuntimeError as error:
            self._end(snapshot, None)
            raise OutOfMemory(
                f"host tier out of memory. The system refuses a thread for saving ({error}); save with use_async=False"
            ) from error
        for chunk in wanted:
            snapshot.before_change(chunk, _may_change_unseen(chunk))

    def wait(self) -> None:
        """Return when nothing is under way.

        Raises
        ------
        Exception
            What went wrong, if it has not been raised yet.
        """
        if self._current is not None:
            self._origin.refuse_elsewhere()
            self.rest()
        self.raise_fault()

    def rest(self) -> None:
        """Return when nothing is under way in this process, whatever went wrong."""
        if self._origin.is_here and self._reader != threading.get_ident():
            with self._changed:
                self._changed.wait_for(lambda: self._current is None)

    def give_room(self) -> bool:
        """Have the memory of copies back, and none made any more; False if there are none. Waits for the reader."""
        current = self._current
        if current is None or not self._origin.is_here:
            return False
        return current.give_room()

    def raise_fault(self) -> None:
        """Raise what went wrong, once."""
        if self._fault is not None:
            fault, self._fault = self._fault, None
            raise fault

    def close(self) -> None:
        """The model is gone, or the process ends: wait for what is under way, and tell what nobody was told of."""
        self.rest()
        if self._fault is not None and self._origin.is_here:
            logger.error("%s", self._fault)
            self._fault = None

    def _run(self, work: Callable[[], None], snapshot: Snapshot) -> None:
        fault: BaseException | None = None
        self._reader = threading.get_ident()
        try:
            compute_on_this_thread(torch.get_num_threads, torch.set_num_threads)
            give_way()
            self._device.take_over()
            work()
        except BaseException as error:
            fault = error
        self._end(snapshot, fault)

    def _end(self, snapshot: Snapshot, fault: BaseException | None) -> None:
        snapshot.close()
        with self._changed:
            self._reader = 0
            self._fault = fault
            self._current = None
            self._changed.notify_all()


def _may_change_unseen(chunk: Chunk) -> set[int]:
    """Positions of parameters that are their own home, and whose changes nothing tells of in time."""
    if not chunk.full_is_home:
        return set()
    lent = chunk.loan.positions if chunk.loan is not None and chunk.is_lent else []
    return {*lent, *chunk.homes.edited_in_place}
