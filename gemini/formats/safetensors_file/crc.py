"""The CRC-32 of bytes from those of their parts, so that threads can share the work on one tensor.

A CRC is the remainder of a polynomial over GF(2). Appending n bytes multiplies what came before by x^(8n), so
``crc(a + b) = crc(a) * x^(8 len(b)) + crc(b)``, modulo the polynomial (zlib's ``crc32_combine``, which Python lacks).
Coefficients are reflected, as in zlib: bit 31 is x^0.
"""

import functools

_Part = tuple[int, int, int, int]

_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31
_X_TO_8 = 1 << 23


def combined(first: int, second: int, second_nbytes: int) -> int:
    """The CRC-32 of two runs of bytes, one after the other.

    Parameters
    ----------
    first, second
        ``zlib.crc32`` of each.
    second_nbytes
        Length of the second.
    """
    return _times(first, _shift(second_nbytes)) ^ second if first else second


class Sums:
    """CRC-32s of a file's tensors from those of their parts, which any threads add in any order."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._parts: list[_Part] = []

    def add(self, begin: int, index: int, crc: int, nbytes: int) -> None:
        """Take a part into account.

        Parameters
        ----------
        begin
            Where it is in the file.
        index
            Of its tensor.
        crc, nbytes
            ``zlib.crc32`` of its bytes, and how many there are.
        """
        self._parts.append((begin, index, crc, nbytes))

    def all(self) -> list[int]:
        """Those of all tensors, once all parts have been added."""
        crcs = [0] * self._count
        for _, index, crc, nbytes in sorted(self._parts):
            crcs[index] = combined(crcs[index], crc, nbytes)
        return crcs


@functools.lru_cache(maxsize=64)
def _shift(nbytes: int) -> int:
    """x^(8 nbytes), by squaring."""
    result, power = _ONE, _X_TO_8
    while nbytes:
        if nbytes & 1:
            result = _times(result, power)
        power = _times(power, power)
        nbytes >>= 1
    return result


def _times(a: int, b: int) -> int:
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product
