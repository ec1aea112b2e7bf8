"""Full copies come and go: the moves that fill them, their memory in the ledger, and what users changed in them.

Forward and backward change no parameter, but ``nn.Embedding(max_norm=...)`` renormalises its weight, and users clamp,
initialise and assign parameters. `FullCopies.quiet` brings all of that home.
"""

from collections.abc import Callable, Collection

from torch import Tensor

from .chunk import Chunk
from .communicator import ALONE, Communicator, Gathering, Span
from .edits import bring_edits_home, check_shape, has_to_stay, is_ahead, put
from .ledger import Ledger
from .memory import DeviceBackend, Transfer
from .move_counts import MoveCounts
from .names import MASTER
from .rounding import changed, check_same, refusal
from .state import ChunkState
from .tier import Tier


class FullCopies:
    """Begins and ends full copies as it is told; whatever fails, memory and ledger agree.

    Parameters
    ----------
    ledger, device
        The ledger, and the backend that has the memory.
    communicator
        The other owners, where chunks are not whole.
    """

    def __init__(self, ledger: Ledger, device: DeviceBackend, communicator: Communicator = ALONE) -> None:
        self.counts = MoveCounts()
        self.resident: dict[Chunk, None] = {}
        """Chunks whose full copy has memory of its own, and maybe one that an interrupt has kept here."""
        self.nbytes = 0
        """What the ledger counts for full copies."""
        self._ledger = ledger
        self._device = device
        self._communicator = communicator
        self._taken: dict[Chunk, Callable[[], bool]] = {}
        """Chunks at home whose full copy's memory an update is filling -> what ends that, and waits for it."""

    def begin(self, chunk: Chunk, background: bool) -> None:
        """Take the memory and start the move, behind the chunk's update if one is under way.

        Raises
        ------
        OffloadError
            If it fails. The chunk is at home then.
        """
        self._ledger.take(Tier.DEVICE, chunk.full_nbytes, f"the full copy of chunk {chunk.index}")
        self.nbytes += chunk.full_nbytes
        self.resident[chunk] = None
        transfer: Transfer | None = None
        try:
            self._device.grow(chunk.full)
            transfer = self._upload(chunk, chunk.update, background)
            chunk.begin_fetch(transfer)
        except BaseException:  # also the error of a pending update, where upload waited for it
            if not chunk.is_resident:
                if transfer is not None:  # an interrupt
                    transfer.wait()
                self._free(chunk)
            raise

    def _upload(self, chunk: Chunk, after: Transfer | None, background: bool) -> Transfer:
        own = self._device.upload(chunk.own_full, chunk.source, after, background)
        if chunk.is_whole:
            return own
        span = Span(chunk.index, MASTER, 0)
        return Gathering(own, self._communicator.gather(span, chunk.full, chunk.plan.extents))

    def arrive(self, chunk: Chunk) -> None:
        """Wait for the move of a chunk, if one is under way. If it failed, the chunk is at home."""
        if chunk.state is ChunkState.FETCHING:
            try:
                chunk.finish_fetch()
            except BaseException:
                if not chunk.is_resident:
                    self._free(chunk)
                raise

    def fill_again(self, chunk: Chunk) -> None:
        """Bring what home has into a full copy that is there."""
        self._upload(chunk, None, background=False).wait()

    def evict(self, chunk: Chunk) -> None:
        """Free a full copy that nothing uses. Does nothing where it is the home itself, or has to stay."""
        if chunk.full_is_home or chunk.is_lent:
            return
        self.arrive(chunk)
        self.quiet(chunk)  # the update may be writing through to the full copy
        if is_ahead(chunk):
            return
        chunk.evict()
        self._free(chunk)
        self.counts.count_eviction()

    # -- memory of full copies that updates fill before a step has asked for them

    @property
    def taken(self) -> Collection[Chunk]:
        """Chunks at home whose full copy's memory an update is filling."""
        return self._taken.keys()

    def hand_out(self, chunk: Chunk, end: Callable[[], bool]) -> Tensor | None:
        """READY -> HOME, and the memory stays for an update that fills it with other values; None if it cannot.

        Parameters
        ----------
        end
            Called when the memory is wanted for anything else: has the update write no more, and waits for that; False
            if it goes on.

        Raises
        ------
        ValueError, OffloadError
            As `quiet`.
        """
        self.quiet(chunk)
        if chunk.state is not ChunkState.READY or chunk.full_is_home or has_to_stay(chunk):
            return None
        chunk.evict()
        del self.resident[chunk]
        self._taken[chunk] = end
        return chunk.full

    def take_over(self, chunk: Chunk) -> None:
        """The update that fills a chunk's memory, if one does, is the step's: it is its full copy again."""
        if chunk in self._taken:
            self.resident[chunk] = None
            del self._taken[chunk]

    def reclaim(self, chunk: Chunk) -> bool:
        """Free the memory that an update is filling, which is worth nothing then. False if there is none."""
        end = self._taken.get(chunk)
        if end is None or not end():
            return False
        del self._taken[chunk]
        self._free(chunk)
        return True

    def quiet(self, chunk: Chunk) -> None:
        """Have the homes be the whole truth: no update is under way, and what was changed in parameters is home.

        Only elements that differ are written, so that the others keep the bits that the compute dtype has no room for.
        What was lent is compared as well: see [Note: Loans].

        Raises
        ------
        OffloadError
            If the update failed. It is tried again.
        ValueError
            If something of another shape was assigned to a parameter, which then keeps its values; if masters are in
            two halves and a module has changed one in its forward: which elements differ cannot be told then; or if a
            parameter was changed whose home would round it.
        """
        chunk.settle()
        self.take_assigned(chunk)
        if chunk.rounds:
            self.refuse_changes(chunk)
        elif not chunk.is_shared:
            bring_edits_home(chunk)

    def bring_home(self, chunk: Chunk) -> None:
        """As `quiet`; also where several owners keep the chunk, who all do so now: their homes change."""
        self.quiet(chunk)
        if chunk.is_shared and not chunk.rounds:
            bring_edits_home(chunk)

    def refuse_lent_changes(self) -> None:
        """`refuse_changes` of each full copy that was lent: nothing tells of a change in it until it is compared."""
        for chunk in list(self.resident):
            if chunk.loan is not None and chunk.rounds:
                self.refuse_changes(chunk)
                chunk.end_loan()

    def refuse_changes(self, chunk: Chunk) -> None:
        """Undo what was changed in a full copy whose home would round it.

        Raises
        ------
        ValueError
            If something was; all is as before then.
        """
        if positions := changed(chunk):
            self.fill_again(chunk)
            for position in positions:
                chunk.accept(position)
            chunk.end_loan()
            raise refusal(chunk, positions)

    def take_assigned(self, chunk: Chunk) -> None:
        """Bring home what the user assigned to ``p.data`` (`torch.nn.utils.vector_to_parameters` does)."""
        for position, value in chunk.bindings.take_assigned():
            self.put(chunk, position, value)

    def put(self, chunk: Chunk, position: int, value: Tensor) -> None:
        """Have home and full copy hold what was assigned to ``p.data``."""
        check_shape(chunk, position, value)
        if chunk.rounds:
            self.refuse_changes(chunk)
            check_same(chunk, position, value)
            return
        chunk.settle()
        self.arrive(chunk)
        self._device.outlast(value)  # in plain PyTorch the parameter would keep it
        put(chunk, position, value)

    def trim(self) -> None:
        """Have the backend give back what it keeps of the memory of those that are gone."""
        self._device.trim()

    def mend(self) -> None:
        """Give back the memory of chunks that are at home: interrupts came before that."""
        for chunk in list(self._taken):
            self.reclaim(chunk)
        for chunk in [chunk for chunk in self.resident if not chunk.is_resident]:
            self._device.shrink(chunk.full)
            del self.resident[chunk]
        resident = sum(chunk.full_nbytes for chunk in self.resident)
        self._ledger.give(Tier.DEVICE, self.nbytes - resident)
        self.nbytes = resident

    def close(self) -> None:
        """Let the chunks go. What lends them memory for gradients leads here, and would keep them."""
        self.resident.clear()
        self._taken.clear()

    def _free(self, chunk: Chunk) -> None:
        self._device.shrink(chunk.full)
        self._ledger.give(Tier.DEVICE, chunk.full_nbytes)
        self.nbytes -= chunk.full_nbytes
        self.resident.pop(chunk, None)
