"""What was written to one disk home, as CRC-32s in RAM: a disk that gives back other bytes is found out."""

import ctypes
import zlib
from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass
from threading import Lock


@dataclass(frozen=True, slots=True, order=True)
class Piece:
    """Bytes ``[begin, end)`` as one write left them."""

    begin: int
    end: int
    crc: int


class Checksums:
    """Of the pieces of one home, each as it was last written. What was never written is not known.

    Writers of the same bytes must take turns, and so must their readers.
    """

    def __init__(self) -> None:
        self._pieces: list[Piece] = []
        """In order, none overlapping another."""
        self._lock = Lock()

    def remember(self, begin: int, address: int, nbytes: int) -> None:
        """Memory at ``address`` has been written from byte ``begin`` on."""
        if nbytes:
            piece = Piece(begin, begin + nbytes, _crc(address, nbytes))
            with self._lock:
                self._drop(begin, begin + nbytes)
                insort(self._pieces, piece)

    def forget(self, begin: int, end: int) -> None:
        """Bytes in this range are about to change: pieces that reach into it are not known any more."""
        with self._lock:
            self._drop(begin, end)

    def disagreeing(self, begin: int, address: int, nbytes: int) -> list[tuple[int, int]]:
        """The pieces within the range, read to ``address``, that are not as they were written."""
        with self._lock:
            within = [
                p for p in self._overlapping(begin, begin + nbytes) if begin <= p.begin <= p.end <= begin + nbytes
            ]
        return [(p.begin, p.end) for p in within if _crc(address + p.begin - begin, p.end - p.begin) != p.crc]

    def overlapping(self, begin: int, end: int) -> list[Piece]:
        """The pieces that lie only partly within the range."""
        with self._lock:
            return [p for p in self._overlapping(begin, end) if p.begin < begin or p.end > end]

    def disagrees(self, piece: Piece, address: int) -> bool:
        """True if a piece, read to ``address``, is not as it was written; False if some of it has been written since.

        The rest of a piece may be another reader's or writer's, who does not wait for this one.
        """
        has_changed = _crc(address, piece.end - piece.begin) != piece.crc
        with self._lock:
            return has_changed and piece in self._overlapping(piece.begin, piece.end)

    def _overlapping(self, begin: int, end: int) -> list[Piece]:
        first = bisect_right(self._pieces, begin, key=lambda piece: piece.end)
        last = bisect_left(self._pieces, end, key=lambda piece: piece.begin)
        return self._pieces[first:last]

    def _drop(self, begin: int, end: int) -> None:
        first = bisect_right(self._pieces, begin, key=lambda piece: piece.end)
        last = bisect_left(self._pieces, end, key=lambda piece: piece.begin)
        del self._pieces[first:last]


def _crc(address: int, nbytes: int) -> int:
    return zlib.crc32((ctypes.c_char * nbytes).from_address(address))
