"""Connections of the page's server: how many there may be, and how long each may take to say what it wants."""

import io
import socket
import threading
import time
from http.client import HTTPException

_HEAD_BYTES = 32 << 10
_HEAD_SECONDS = 15.0
"""For the whole of a request, from when the one before it was answered: a byte now and then is no progress."""
WRITE_SECONDS = 30.0


class RequestTooLong(HTTPException):
    """A request has more bytes than any browser sends."""


class RequestReader(io.RawIOBase):
    """Reads requests from a connection, each with a limit of time and of bytes. What is written has a limit of time."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.begin()

    def begin(self) -> None:
        """A request is waited for from now on."""
        self._deadline = time.monotonic() + _HEAD_SECONDS
        self._left = _HEAD_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        seconds = self._deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        if self._left <= 0:
            raise RequestTooLong
        self._connection.settimeout(seconds)
        try:
            count = self._connection.recv_into(memoryview(buffer)[: self._left])
        finally:
            self._connection.settimeout(WRITE_SECONDS)
        self._left -= count
        return count


class Connections:
    """The connections that are open.

    When there are as many as there may be, the one that has waited longest for its client to say something makes room.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiting: dict[socket.socket, None] = {}
        """In the order in which they began to wait."""
        self._served: set[socket.socket] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._served)

    def admit(self, connection: socket.socket) -> bool:
        """Count one more, which waits; False if there are too many."""
        with self._lock:
            if len(self) >= self._most:
                oldest = next(iter(self._waiting), None)
                if oldest is None:
                    return False
                del self._waiting[oldest]
                _hang_up(oldest)
            self._waiting[connection] = None
            return True

    def serve(self, connection: socket.socket) -> None:
        """Its client has said what it wants."""
        with self._lock:
            if connection in self._waiting:
                del self._waiting[connection]
                self._served.add(connection)

    def wait(self, connection: socket.socket) -> None:
        """It was answered, and may ask again."""
        with self._lock:
            if connection in self._served:
                self._served.discard(connection)
                self._waiting[connection] = None

    def leave(self, connection: socket.socket) -> None:
        """It is over. Idempotent."""
        with self._lock:
            self._waiting.pop(connection, None)
            self._served.discard(connection)


def _hang_up(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it
    except OSError:
        pass  # its client was faster
