"""Letters and tensors between ranks, point to point, over a Gloo group that nobody else uses.

Gloo matches a send with a receive by their tag. One tag is for letters: a thread takes them in, from whichever rank.
Tensors go by tags of their own, straight from and to the memory that they are for. Nothing here is a collective.
"""

import itertools
import logging
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import RankError
from ..process_wide import small_stacks
from .messages import AnyLetter, Letter, Ping, decode, encode

logger = logging.getLogger(__name__)

PING_SECONDS = 0.5
"""How often one who waits looks whether those that it waits for are still there."""
LETTER_NUMEL = 512
"""Bytes of a letter; one that is longer comes as a tensor behind it."""
_HEAD = 12
_LETTERS = 0
_LONG_LETTERS = 1
_RECEIVERS_TAGS = range(2, 1 << 29)
_SENDERS_TAGS = range(1 << 29, 1 << 30)
"""From one rank to another go tensors by tags that either has chosen."""
_ORIGIN = re.compile(r"^\[[^]]*\] ")
"""Where in Gloo's sources an error comes from."""
_FOREVER = timedelta(days=3650)
_UNDERWAY = 16
"""Letters to one rank that may be on their way. They are taken in at once, so that waiting for one is short."""

Handle = Callable[[int, AnyLetter], None]
"""Takes in a letter from a rank. It must not wait for another one, nor write any."""


class PointToPoint(Protocol):
    """A Gloo group, as far as it is used here."""

    def send(self, tensors: list[Tensor], to: int, tag: int, /) -> dist.Work: ...

    def recv(self, tensors: list[Tensor], sender: int, tag: int, /) -> dist.Work: ...

    def recv_anysource(self, tensors: list[Tensor], tag: int, /) -> dist.Work: ...


class Mailbox:
    """Sends and receives for one rank.

    Parameters
    ----------
    group
        The Gloo group.
    index, names
        Our place in it, and what to call its members in messages.
    timeout
        How long the others may take to do their part of a transfer.
    """

    def __init__(self, group: PointToPoint, index: int, names: tuple[str, ...], timeout: timedelta) -> None:
        self.index = index
        self.names = names
        self.timeout = timeout
        self._group = group
        self._receivers_tags, self._senders_tags = itertools.cycle(_RECEIVERS_TAGS), itertools.cycle(_SENDERS_TAGS)
        self._underway: list[deque[tuple[dist.Work, Tensor]]] = [deque() for _ in names]
        self._locks = [threading.Lock() for _ in names]
        self._lost: dict[int, str] = {}
        self._listener: threading.Thread | None = None

    @property
    def others(self) -> list[int]:
        """Every index but ours."""
        return [index for index in range(len(self.names)) if index != self.index]

    def listen(self, handle: Handle, is_over: Callable[[], bool]) -> None:
        """Have letters handled from now on, by a thread of ours, until ``is_over`` after one of them."""
        with small_stacks():
            self._listener = threading.Thread(
                target=self._listen, args=(handle, is_over), name="gemini-memory-letters", daemon=True
            )
            self._listener.start()

    def join(self, seconds: float) -> None:
        """Wait for the end of the thread that `listen` has started; a process that ends before it may crash."""
        if self._listener is not None:
            self._listener.join(seconds)

    def tag_to_receive(self) -> int:
        """A tag for a tensor that this rank asks for."""
        return next(self._receivers_tags)

    def tag_to_send(self) -> int:
        """A tag for a tensor that this rank sends unasked."""
        return next(self._senders_tags)

    # -- letters

    def post(self, to: int, letter: Letter) -> None:
        """Write to a rank.

        Raises
        ------
        RankError
            If it is gone.
        """
        data = encode(letter)
        flat = torch.zeros(LETTER_NUMEL, dtype=torch.uint8, device="cpu")
        head = len(data).to_bytes(8, "little") + self.index.to_bytes(4, "little")
        is_long = len(data) > LETTER_NUMEL - _HEAD
        content = head + (b"" if is_long else data)
        flat[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        with self._locks[to], self.talking_to(to):
            underway = self._underway[to]
            while len(underway) >= _UNDERWAY:
                underway.popleft()[0].wait(self.timeout)
            underway.append((self._group.send([flat], to, _LETTERS), flat))
            if is_long:
                rest = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                underway.append((self._group.send([rest], to, _LONG_LETTERS), rest))

    def post_all(self, letter: Letter) -> None:
        """Write to every other rank."""
        for to in self.others:
            self.post(to, letter)

    def _listen(self, handle: Handle, is_over: Callable[[], bool]) -> None:
        flat = torch.empty(LETTER_NUMEL, dtype=torch.uint8, device="cpu")
        try:
            while not is_over():
                self._group.recv_anysource([flat], _LETTERS).wait(_FOREVER)
                content = bytes(flat.numpy())
                nbytes, sender = int.from_bytes(content[:8], "little"), int.from_bytes(content[8:_HEAD], "little")
                if nbytes > LETTER_NUMEL - _HEAD:
                    rest = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
                    self._group.recv([rest], sender, _LONG_LETTERS).wait(self.timeout)
                    data = bytes(rest.numpy())
                else:
                    data = content[_HEAD : _HEAD + nbytes]
                handle(sender, decode(data))
        except RuntimeError as error:  # Gloo's; who waits for a letter finds its sender gone
            logger.debug("no letters are taken in any more: %s", error)

    # -- tensors

    def send(self, to: int, tag: int, tensor: Tensor) -> "Sending":
        """Begin to send a tensor (flat, on CPU), which must not change before it has been received."""
        with self.talking_to(to):
            return Sending(self, to, self._group.send([tensor], to, tag), tensor)

    def receive(self, sender: int, tag: int, into: Tensor) -> "Sending":
        """Begin to receive a tensor into memory (flat, on CPU)."""
        with self.talking_to(sender):
            return Sending(self, sender, self._group.recv([into], sender, tag), into)

    # -- who is there

    def is_lost(self, index: int) -> bool:
        """True if a rank is known to be gone without a goodbye."""
        return index in self._lost

    def lost(self, index: int, error: BaseException) -> RankError:
        """Note that a rank is gone. Returns the error that says so."""
        first_line = _ORIGIN.sub("", str(error).partition("\n")[0]).partition(". ")[0]
        self._lost.setdefault(index, first_line)
        is_late = "Timed out" in first_line or "timeout" in first_line
        what = f"does not answer within {self.timeout.total_seconds():g} s" if is_late else "is gone"
        return RankError(
            f"{self.names[index]} {what} ({self._lost[index]}). The other ranks cannot train on without it: its part "
            "of the model is lost. Start again from the last checkpoint (torchrun --max-restarts does so by itself)"
        )

    def check(self, indices: Iterable[int]) -> None:
        """See whether these ranks are still there.

        Raises
        ------
        RankError
            If one is not.
        """
        for index in indices:
            self.post(index, Ping())

    @contextmanager
    def talking_to(self, index: int) -> Iterator[None]:
        """Have an error of Gloo name the rank.

        Raises
        ------
        RankError
            In its place.
        """
        try:
            yield
        except RankError:
            raise
        except RuntimeError as error:
            raise self.lost(index, error) from error


class Sending:
    """A tensor on its way, one way or the other; it keeps the memory."""

    def __init__(self, mailbox: Mailbox, index: int, work: dist.Work, tensor: Tensor) -> None:
        self._mailbox = mailbox
        self._index = index
        self._work = work
        self._tensor = tensor

    def wait(self) -> None:
        """Return when it has arrived.

        Raises
        ------
        RankError
            If the other rank is gone, or does not do its part in time.
        """
        with self._mailbox.talking_to(self._index):
            self._work.wait(self._mailbox.timeout)
