"""Which parts of a file or of a block of memory are free. Pure."""

from bisect import bisect


class FreeRoom:
    """Offsets ``[0, nbytes)``, all free at first; the first gap that is large enough is taken."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._gaps = [(0, nbytes)]
        """Begin and end of each, in order; no two touch."""

    @property
    def is_whole(self) -> bool:
        """True if nothing is taken."""
        return self._gaps == [(0, self._nbytes)]

    @property
    def largest(self) -> int:
        """Bytes of the largest gap."""
        return max((end - begin for begin, end in self._gaps), default=0)

    def take(self, nbytes: int) -> int | None:
        """The offset of ``nbytes`` that were free, or None if no gap is large enough."""
        for i, (begin, end) in enumerate(self._gaps):
            if nbytes <= end - begin:
                self._gaps[i : i + 1] = [(begin + nbytes, end)] if begin + nbytes < end else []
                return begin
        return None

    def give(self, begin: int, nbytes: int) -> None:
        """Have what was taken at ``begin`` free again, as one gap with those beside it."""
        if nbytes == 0:
            return
        end, i = begin + nbytes, bisect(self._gaps, (begin, begin))
        assert 0 <= begin and end <= self._nbytes, "this was never there"
        assert i == 0 or self._gaps[i - 1][1] <= begin, "this is free already"
        assert i == len(self._gaps) or end <= self._gaps[i][0], "this is free already"
        first = i - 1 if i and self._gaps[i - 1][1] == begin else i
        last = i + 1 if i < len(self._gaps) and self._gaps[i][0] == end else i
        joined = [*self._gaps[first:i], (begin, end), *self._gaps[i:last]]
        self._gaps[first:last] = [(joined[0][0], joined[-1][1])]
