"""Ranges of bytes in files: read in blocks, without caches of our own, and their CRC-32."""

import os
import stat
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .damage import Damaged, Unreadable

_BLOCK_BYTES = 1 << 20
"""Stays in a core's cache between the read and the checksum."""
_SMALL_BYTES = 4096


class FileBytes:
    """A regular file opened for reading. A context manager.

    Raises
    ------
    Damaged
        If it cannot be opened, or is a pipe, a device or a folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # A pipe would wait for its writer.
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise Unreadable(f"{path} cannot be read: {error.strerror}") from error
        found = os.fstat(self.fd)
        if not stat.S_ISREG(found.st_mode):
            os.close(self.fd)
            raise Damaged(f"{path} is not a file")
        self.nbytes = found.st_size

    def __enter__(self) -> "FileBytes":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def read(self, offset: int, count: int, what: str) -> bytes:
        """Exactly these bytes; ``what`` names them in messages."""
        if count <= _SMALL_BYTES:
            with suppress(OSError):  # told below
                found = os.pread(self.fd, count, offset)
                if len(found) == count:
                    return found
        buffer = bytearray(count)
        self._fill(memoryview(buffer), offset, what)
        return bytes(buffer)

    def crc32(self, offset: int, count: int, what: str, tell: Callable[[int], None] = lambda nbytes: None) -> int:
        """The checksum of a range; ``tell`` is told each block's bytes when these are summed."""
        if count <= _SMALL_BYTES:
            tell(count)
            return zlib.crc32(self.read(offset, count, what))
        buffer = memoryview(bytearray(min(count, _BLOCK_BYTES)))
        value, done = 0, 0
        while done < count:
            block = buffer[: count - done]
            self._fill(block, offset + done, what)
            value = zlib.crc32(block, value)
            done += len(block)
            tell(len(block))
        return value

    def _fill(self, out: memoryview, offset: int, what: str) -> None:
        done = 0
        while done < len(out):
            try:
                count = os.preadv(self.fd, [out[done:]], offset + done)
            except OSError as error:
                raise Unreadable(f"{self.path}: reading {what} failed: {error.strerror}") from error
            if count == 0:
                raise Damaged(f"{self.path} ends in the middle of {what}; it became shorter while it was read")
            done += count
