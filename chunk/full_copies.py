"""Full copies come and go: their memory, as the ledger counts it, and the moves that fill it."""

from collections.abc import Sequence

from .chunk import Chunk
from .ledger import Ledger
from .memory import DeviceBackend, Transfer
from .tier import Tier


class FullCopies:
    """Begins and ends what `ChunkManager` decides; whatever fails, memory and ledger agree.

    Parameters
    ----------
    ledger, device
        The ledger, and the backend that has the memory.
    """

    def __init__(self, ledger: Ledger, device: DeviceBackend) -> None:
        self._ledger = ledger
        self._device = device
        self._nbytes = 0
        """What the ledger counts for full copies."""

    def begin(self, chunk: Chunk, background: bool) -> None:
        """Take the memory and start the move, behind the chunk's update if one is under way."""
        self._ledger.take(Tier.DEVICE, chunk.full_nbytes, f"the full copy of chunk {chunk.index}")
        self._nbytes += chunk.full_nbytes
        transfer: Transfer | None = None
        try:
            self._device.grow(chunk.full)
            transfer = self._device.upload(chunk.full, chunk.source, chunk.update, background)
            chunk.begin_fetch(transfer)
        except BaseException:  # also the error of a pending update, where upload waited for it
            if not chunk.is_resident:
                if transfer is not None:  # an interrupt
                    transfer.wait()
                self.free(chunk)
            raise

    def arrive(self, chunk: Chunk) -> None:
        """Wait for the move of a chunk that is FETCHING."""
        try:
            chunk.finish_fetch()
        except BaseException:
            if not chunk.is_resident:
                self.free(chunk)
            raise

    def fill_again(self, chunk: Chunk) -> None:
        """Bring what home has into a full copy that is there."""
        self._device.upload(chunk.full, chunk.source, None, background=False).wait()

    def free(self, chunk: Chunk) -> None:
        """Give the memory of a chunk that is at home back."""
        self._device.shrink(chunk.full)
        self._ledger.give(Tier.DEVICE, chunk.full_nbytes)
        self._nbytes -= chunk.full_nbytes

    def mend(self, chunks: Sequence[Chunk]) -> None:
        """Give back what belongs to chunks that are at home: interrupts came before their `free`."""
        resident = sum(chunk.full_nbytes for chunk in chunks if chunk.is_resident)
        if self._nbytes != resident:
            for chunk in chunks:
                if not (chunk.is_resident or chunk.full_is_home):
                    self._device.shrink(chunk.full)
            self._ledger.give(Tier.DEVICE, self._nbytes - resident)
            self._nbytes = resident
