"""Gradients of our backward on their way to the owners of their extents."""

import threading
from collections.abc import Sequence

from ..chunk.communicator import Contribution
from ..errors import RankError
from .mailbox import Mailbox, Sending
from .messages import Part, Received


class Shipment:
    """The gradient of one chunk on its way to all owners (a `Delivery`)."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._changed = threading.Condition()
        self._left: set[object] = set()
        self._works: list[Sending] = []
        self._error: BaseException | None = None

    def goes(self, key: object, work: Sending | None) -> None:
        """One more part is under way."""
        with self._changed:
            self._left.add(key)
            if work is not None:
                self._works.append(work)

    def arrived(self, key: object) -> None:
        """A part is where it goes to."""
        with self._changed:
            self._left.discard(key)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """It never will be."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    @property
    def is_over(self) -> bool:
        return not self._left

    def wait(self) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: not self._left or self._error is not None, self._timeout):
                raise RankError(
                    f"a gradient has not been taken by the other ranks within {self._timeout:g} s, the timeout of the "
                    "process group: they run no backward. Give launch_from_torch a longer timeout if they are slow"
                )
            if self._error is not None:
                raise self._error
            works, self._works = self._works, []  # Gloo's can be waited for once
        for work in works:
            work.wait()


class Shipping:
    """Sends parts, and takes in that they have arrived.

    Parameters
    ----------
    mailbox
        Takes them.
    """

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._lock = threading.Lock()
        self._underway: dict[tuple[int, int], Shipment] = {}
        """By receiver and tag."""

    def send(
        self, chunk: int, contribution: Contribution, extents: Sequence[range], generation: int, rounds: int
    ) -> Shipment:
        """Send each other rank its extent of a chunk's gradient (flat, on CPU); replicas have the same extents."""
        mailbox, gradient = self._mailbox, contribution.gradient
        present, anew = sorted(contribution.present), sorted(contribution.anew)
        dtype = str(gradient.dtype).removeprefix("torch.")
        shipment = Shipment(mailbox.timeout.total_seconds())
        for to in mailbox.others:
            extent, tag = extents[to % len(extents)], mailbox.tag_to_send()
            if extent:
                with self._lock:
                    self._underway[to, tag] = shipment
                shipment.goes((to, tag), mailbox.send(to, tag, gradient[extent.start : extent.stop]))
            mailbox.post(to, Part(generation, rounds, chunk, present, anew, len(extent), dtype, tag))
        return shipment

    def received(self, sender: int, letter: Received) -> None:
        """Take in a letter."""
        with self._lock:
            shipment = self._underway.pop((sender, letter.tag), None)
        if shipment is not None:
            shipment.arrived((sender, letter.tag))
