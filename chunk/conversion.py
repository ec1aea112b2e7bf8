"""How masters arrive in a full copy of another dtype: in pieces, through memory that the copy has not filled yet.

Converting on the device costs nothing, on the CPU it costs more than the link. What arrives needs memory there. The end
of the full copy is free until its turn comes, so pieces arrive there, shorter ones towards the end; a few elements are
left over for a scratch of their own.

::

    full copy, numel elements of 2 bytes
    |-- done --|-- piece --|-- not filled yet --|== the piece as it arrives, 4 bytes an element ==|
"""

from collections.abc import Iterator
from dataclasses import dataclass

PIECE_NUMEL = 4 << 20
"""Elements that arrive at once: long enough for the link's full speed."""
SCRATCH_NUMEL = 1 << 12


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements of a full copy that are filled together."""

    start: int
    stop: int
    room: int | None
    """The element of the full copy where they arrive; None: in the scratch."""


def conversion_pieces(
    numel: int, ratio: int, longest: int = PIECE_NUMEL, scratch: int = SCRATCH_NUMEL
) -> Iterator[Piece]:
    """Cut a full copy into pieces.

    Parameters
    ----------
    numel
        Its elements.
    ratio
        Bytes of what arrives for each byte of the full copy.
    longest, scratch
        Elements of the longest piece, and of those that go through the scratch.
    """
    end = numel - numel % ratio  # so that what arrives lies at a multiple of its own size
    start = 0
    while start < numel:
        fits = min(longest, (end - start) // (1 + ratio))
        if fits <= scratch:
            stop = min(start + scratch, numel)
            yield Piece(start, stop, None)
        else:
            stop = start + fits
            yield Piece(start, stop, end - ratio * fits)
        start = stop
