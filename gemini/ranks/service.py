"""Answering the other ranks from what is at home here, whatever the training thread does meanwhile."""

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

import torch

from ..chunk.communicator import Source, Span
from ..errors import RankError
from ..process_wide import small_stacks
from .mailbox import Mailbox
from .messages import Failure, Request

logger = logging.getLogger(__name__)

WORKERS = 2
"""Threads that answer: one converts while the other sends."""


class Service:
    """Answers requests on threads of its own. What asks for values that are not there yet waits in a list, not on one.

    Parameters
    ----------
    mailbox
        Takes the answers.
    """

    def __init__(self, mailbox: Mailbox) -> None:
        self.answered = 0
        self._mailbox = mailbox
        self._lock = threading.Lock()
        self._parked: list[tuple[int, Request]] = []
        self._queue: SimpleQueue[tuple[int, Request, Source, str] | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"gemini-memory-answers-{number}", daemon=True)
            for number in range(WORKERS)
        ]
        with small_stacks():
            for thread in self._threads:
                thread.start()

    def received(self, sender: int, request: Request) -> None:
        """Take in a request."""
        with self._lock:
            self._parked.append((sender, request))

    def release(self, source: Source | None, judge: Callable[[Request], str | None]) -> None:
        """Answer what can be answered now.

        Parameters
        ----------
        source
            What we have; None if it is not built yet.
        judge
            Says of a request: None if what it asks for is not there yet, why it never will be, or nothing if it is.
        """
        if source is None:
            return
        with self._lock:
            judged = [(item, judge(item[1])) for item in self._parked]
            self._parked = [item for item, verdict in judged if verdict is None]
        for item, verdict in judged:
            if verdict is not None:
                self._queue.put((*item, source, verdict))

    def close(self, seconds: float) -> None:
        """End the threads. One that Gloo has when Python ends is a crash."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(seconds)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                self._answer(*item)
            except RankError as error:
                logger.debug("an answer was not wanted any more: %s", error)
            del item  # not to hold the model until the next request

    def _answer(self, sender: int, request: Request, source: Source, refusal: str) -> None:
        values = None
        if not refusal:
            try:
                span = Span(request.chunk, request.name, request.start)
                values = source.read(span, request.numel, getattr(torch, request.dtype))
            except Exception as error:
                refusal = f"{type(error).__name__}: {error}"
        if values is None:
            self._mailbox.post(sender, Failure(request.tag, refusal))
        status = torch.tensor([int(values is None)], dtype=torch.int64, device="cpu")
        works = [self._mailbox.send(sender, request.tag, status)]
        if values is not None:
            works.append(self._mailbox.send(sender, request.values_tag, values))
        for work in works:
            work.wait()
        self.answered += 1
