"""The CRC-32 of bytes from those of their parts, so that threads can share the work on one tensor.

A CRC is the remainder of a polynomial over GF(2). Appending n bytes multiplies what came before by x^(8n), so
``crc(a + b) = crc(a) * x^(8 len(b)) + crc(b)``, modulo the polynomial (zlib's ``crc32_combine``, which Python lacks).
Coefficients are reflected, as in zlib: bit 31 is x^0.
"""

import functools

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
