"""What the owners of a model's chunks do together: collect gradients, and change values at home."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .chunk import Chunk
from .communicator import Communicator
from .full_copies import FullCopies
from .gradient_pool import GradientPool
from .memory import DeviceBackend
from .served import Served
from .shared_gradient import SharedGradient


class Together:
    """Has the chunks of one owner in the state in which all may go on. A process alone goes on at once.

    Parameters
    ----------
    communicator
        The other owners.
    chunks, full_copies, gradient_pool, device
        What is here.
    """

    def __init__(
        self,
        communicator: Communicator,
        chunks: Sequence[Chunk],
        full_copies: FullCopies,
        gradient_pool: GradientPool,
        device: DeviceBackend,
    ) -> None:
        self.communicator = communicator
        self._chunks = chunks
        self._full_copies = full_copies
        self._gradient_pool = gradient_pool
        self._served = Served(chunks, device)
        self._is_changing = False

    def serve(self) -> None:
        """The homes are filled: the other owners may have what is there."""
        self.communicator.serve(self._served)

    def complete_gradients(self) -> None:
        """A backward has come to its end: gradients that several owners keep go to the owners of their extents."""
        if self.communicator.owner.is_alone:
            return
        for gradient in self._shared_gradients():
            gradient.complete()
        if not self.communicator.is_silent:
            self.communicator.end_round()

    def collect_gradients(self, doing: str, has_changed: bool) -> bool:
        """Have the sums of all owners' gradients at home, when all are here.

        Returns whether the user has changed gradients with any owner (``has_changed`` says so for this one).

        Raises
        ------
        RankError
            See `Communicator.collect`.
        """
        if self.communicator.owner.is_alone:
            return has_changed
        if any(gradient.is_unsent for gradient in self._shared_gradients()):
            self.complete_gradients()
        self._arrive()
        has_changed = self.communicator.collect(doing, has_changed)
        self._gradient_pool.take_all_back()  # ours are about to be where they go to, as all are here
        for chunk in self._chunks:
            if chunk.is_shared:
                self._full_copies.bring_home(chunk)
        return has_changed

    @contextmanager
    def changing(self, doing: str) -> Iterator[None]:
        """Values at home are about to change, here and with all owners: wait until all are about to do so."""
        if self._is_changing or self.communicator.owner.is_alone:
            yield
            return
        self._arrive()
        self.communicator.agree(doing)
        self._is_changing = True
        try:
            yield
        finally:
            self._is_changing = False
            self.communicator.advance()

    def _arrive(self) -> None:
        """Have no move from other owners under way: from now on their values change."""
        for chunk in self._chunks:
            self._full_copies.arrive(chunk)

    def _shared_gradients(self) -> list[SharedGradient]:
        return [chunk.gradient for chunk in self._chunks if isinstance(chunk.gradient, SharedGradient)]
