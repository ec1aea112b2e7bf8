"""The thread that adds gradients to the homes here, one after the other as it is given them."""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue

import torch

from ..chunk.communicator import Contribution, Source
from ..errors import RankError
from ..process_wide import small_stacks
from .mailbox import Mailbox
from .messages import Part, Received
from .shipping import Shipment

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ours:
    """A contribution of our own backward."""

    generation: int
    chunk: int
    contribution: Contribution
    shipment: Shipment


@dataclass(frozen=True, slots=True)
class Theirs:
    """One that another rank has announced."""

    sender: int
    part: Part


class Sums:
    """Receives what is not here yet, and adds it to the gradients of a source.

    Parameters
    ----------
    mailbox
        Brings the tensors.
    on_sum
        Called by the thread when it has added something.
    """

    def __init__(self, mailbox: Mailbox, on_sum: Callable[[], None]) -> None:
        self.generation = 0
        """Contributions of another generation are received and dropped: their senders wait for that."""
        self.changed = threading.Condition()
        """Held to look at what is left to do, and notified when something has been done."""
        self._mailbox = mailbox
        self._on_sum = on_sum
        self._source: Callable[[], Source | None] | None = None
        self._adding = threading.Lock()
        """Held while something is added, so that nothing is once it has been dropped."""
        self._left = 0
        self._error: BaseException | None = None
        self._queue: SimpleQueue[Ours | Theirs | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="gemini-memory-sums", daemon=True)
        with small_stacks():
            self._thread.start()

    @property
    def has_source(self) -> bool:
        """True if there are chunks whose gradients can be added to."""
        return self._source is not None

    def serve(self, source: Callable[[], Source | None]) -> None:
        """Add to this source, for as long as it is there."""
        self._source = source

    def put(self, items: Iterable[Ours | Theirs]) -> None:
        """Have these added next, in this order. ``changed`` is held."""
        for item in items:
            self._left += 1
            self._queue.put(item)

    @property
    def is_idle(self) -> bool:
        """True if all that was given has been added."""
        return not self._left

    @property
    def has_failed(self) -> bool:
        """True if something could not be added."""
        return self._error is not None

    def check(self) -> None:
        """Raise RankError if something could not be added."""
        if (error := self._error) is not None:
            raise RankError(f"the gradients of the ranks could not be summed: {error}") from error

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """A context in which nothing is added."""
        with self._adding:
            yield

    def begin(self, generation: int) -> None:
        """All before this generation has been dropped."""
        self.generation, self._error = generation, None

    def close(self, seconds: float) -> None:
        """End the thread. One that Gloo has when Python ends is a crash."""
        self._queue.put(None)
        self._thread.join(seconds)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                self._sum(item)
            except Exception as error:
                logger.debug("a gradient could not be summed: %s", error)
                with self.changed:
                    self._error = self._error or error
            with self.changed:
                self._left -= 1
                self.changed.notify_all()
            self._on_sum()
            del item

    def _sum(self, item: Ours | Theirs) -> None:
        if isinstance(item, Ours):
            try:
                self._add(item.generation, item.chunk, item.contribution)
            finally:
                item.shipment.arrived(self._mailbox.index)
            return
        part = item.part
        gradient = torch.empty(part.numel, dtype=getattr(torch, part.dtype), device="cpu")
        if part.numel:
            self._mailbox.receive(item.sender, part.tag, gradient).wait()
        self._add(part.generation, part.chunk, Contribution(frozenset(part.present), gradient, frozenset(part.anew)))
        if part.numel:
            self._mailbox.post(item.sender, Received(part.tag))

    def _add(self, generation: int, chunk: int, contribution: Contribution) -> None:
        with self._adding:
            source = None if self._source is None else self._source()
            if source is not None and generation == self.generation:
                source.add(chunk, contribution)
