"""Asking owners for what they have at home."""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from ..chunk.communicator import Span
from ..errors import RankError
from .mailbox import Mailbox, Sending
from .messages import Failure, Request

_FAILURE_SECONDS = 10.0
"""How long the reason of a failure may take to come; it has been sent before the word that there is one."""


class Fetches:
    """Sends requests, and knows why some were not answered.

    Parameters
    ----------
    mailbox
        Takes them.
    first
        The place among all ranks of the first one that keeps this replica.
    """

    def __init__(self, mailbox: Mailbox, first: int) -> None:
        self._mailbox = mailbox
        self._first = first
        self._changed = threading.Condition()
        self._failures: dict[int, str] = {}

    def received(self, letter: Failure) -> None:
        """Take in why a request cannot be answered."""
        with self._changed:
            self._failures[letter.tag] = letter.text
            self._changed.notify_all()

    def begin(
        self, span: Span, whole: Tensor, parts: Sequence[range], epoch: int, rounds: int, generation: int
    ) -> "Fetch":
        """Ask each owner for its part of ``whole``."""
        answers = []
        for index, part in enumerate(parts, self._first):
            if index == self._mailbox.index or not part:
                continue
            into = whole[part.start : part.stop]
            flat = into if into.device.type == "cpu" else torch.empty(len(part), dtype=into.dtype, device="cpu")
            tag, values_tag = self._mailbox.tag_to_receive(), self._mailbox.tag_to_receive()
            status = torch.zeros(1, dtype=torch.int64, device="cpu")
            works = self._mailbox.receive(index, tag, status), self._mailbox.receive(index, values_tag, flat)
            dtype = str(whole.dtype).removeprefix("torch.")
            start = span.start + part.start
            request = Request(
                span.chunk, span.name, start, len(part), dtype, epoch, rounds, generation, tag, values_tag
            )
            self._mailbox.post(index, request)
            answers.append(_Answer(self, index, tag, status, flat, into, works))
        return Fetch(answers)

    def failure(self, index: int, tag: int) -> RankError:
        """Why a request was not answered."""
        with self._changed:
            self._changed.wait_for(lambda: tag in self._failures, _FAILURE_SECONDS)
            text = self._failures.pop(tag, "it does not say why")
        return RankError(f"{self._mailbox.names[index]} cannot give what it has at home: {text}")


class _Answer:
    """What one owner is to send."""

    def __init__(
        self,
        fetches: Fetches,
        index: int,
        tag: int,
        status: Tensor,
        flat: Tensor,
        into: Tensor,
        works: tuple[Sending, Sending],
    ) -> None:
        self._fetches = fetches
        self._index = index
        self._tag = tag
        self._status = status
        self._flat = flat
        self._into = into
        self._works = works

    def wait(self) -> None:
        status, values = self._works
        status.wait()
        if self._status.item():
            raise self._fetches.failure(self._index, self._tag)
        values.wait()
        if self._into is not self._flat:
            self._into.copy_(self._flat)


class Fetch:
    """Values on their way from other ranks (a `Transfer`)."""

    def __init__(self, answers: list[_Answer]) -> None:
        self._answers = answers
        self._error: BaseException | None = None

    def wait(self) -> None:
        """Return when all are there: no memory is written to afterwards, also where one has failed."""
        while self._answers:
            try:
                self._answers[-1].wait()
            except RankError as error:
                self._error = error
            self._answers.pop()
        if self._error is not None:
            raise self._error

    def done(self) -> bool:
        return not self._answers

    def rest(self, seconds: float) -> None:
        pass  # no thread of ours works on it
