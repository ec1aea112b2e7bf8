"""Gradients of our backward on their way to the owners of their extents."""

import threading
from collections.abc import Sequence

from ..chunk.communicator import Contribution
from .mailbox import Mailbox, Sending
from .messages import Part, Received
from .patience import Patience


class Shipment:
    """The gradient of one chunk on its way to all owners (a `Delivery`)."""

    def __init__(self, own: int, others: Sequence[int], patience: Patience) -> None:
        self._own = own
        self._others = others
        self._patience = patience
        self._changed = threading.Condition()
        self._left: set[int] = set()
        """The ranks that do not have their part."""
        self._works: list[Sending] = []

    def goes(self, to: int, work: Sending | None) -> None:
        """One more part is under way."""
        with self._changed:
            self._left.add(to)
            if work is not None:
                self._works.append(work)

    def arrived(self, to: int) -> None:
        """A part is where it goes to."""
        with self._changed:
            self._left.discard(to)
            self._changed.notify_all()

    @property
    def is_over(self) -> bool:
        return not self._left

    def wait(self) -> None:
        self._patience.wait(
            self._changed,
            self._missing,
            lambda names: (
                f"a gradient has not been taken by {names} within {self._patience.seconds:g} s, the timeout of the "
                "process group: they run fewer backwards than this rank, and no step. Give launch_from_torch a longer "
                "timeout if they are slow"
            ),
        )
        with self._changed:
            works, self._works = self._works, []  # Gloo's can be waited for once
        for work in works:
            work.wait()

    def _missing(self) -> Sequence[int]:
        """Those that are waited for: all others where our own part waits for its turn."""
        return self._others if self._left == {self._own} else sorted(self._left - {self._own})


class Shipping:
    """Sends parts, and takes in that they have arrived.

    Parameters
    ----------
    mailbox
        Takes them.
    patience
        Waits for them to be there.
    """

    def __init__(self, mailbox: Mailbox, patience: Patience) -> None:
        self._mailbox = mailbox
        self._patience = patience
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
        shipment = Shipment(mailbox.index, mailbox.others, self._patience)
        for to in mailbox.others:
            extent, tag = extents[to % len(extents)], mailbox.tag_to_send()
            if extent:
                with self._lock:
                    self._underway[to, tag] = shipment
                shipment.goes(to, mailbox.send(to, tag, gradient[extent.start : extent.stop]))
            mailbox.post(to, Part(generation, rounds, chunk, present, anew, len(extent), dtype, tag))
        return shipment

    def received(self, sender: int, letter: Received) -> None:
        """Take in a letter."""
        with self._lock:
            shipment = self._underway.pop((sender, letter.tag), None)
        if shipment is not None:
            shipment.arrived(sender)
