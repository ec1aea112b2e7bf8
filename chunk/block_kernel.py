"""[Note: Block formats] compiled by numba, on numpy arrays. Import this module only when there is something to do.

Each function does for whole blocks what the reference in `block_format` does, with the same bits. They release the GIL:
a fetch decodes in a thread beside forward and backward. ``fastmath`` would change results.
"""

import logging
from collections.abc import Callable

import numpy as np
from numba import config, njit
from numpy.typing import NDArray

from .block_format import BLOCK_NUMEL

if config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")

_logger = logging.getLogger(__name__)
_BLOCK = BLOCK_NUMEL
_BYTES = BLOCK_NUMEL // 2
_SMALLEST_ABSMAX = np.float32(1e-38)
_ONE = np.float32(1.0)
_SPAN = np.float32(127.0)

Kernel = Callable[..., None]


def _compiled(function: Kernel) -> Kernel:
    options = {"nogil": True, "error_model": "numpy"}
    try:
        made: Kernel = njit(cache=True, **options)(function)
    except RuntimeError as error:
        _logger.info("the compiled %s cannot be kept for the next process: %s", function.__name__, error)
        made = njit(**options)(function)
    return made


@_compiled
def scale(values: NDArray[np.generic], absmax: NDArray[np.generic]) -> None:
    """Scale blocks of float32 to [-1, 1] in place, and note by what."""
    bits = values.view(np.int32)
    for block in range(absmax.size):
        start = block * _BLOCK
        largest = np.int32(0)
        for i in range(start, start + _BLOCK):  # as integers: NaN is above all numbers
            magnitude = bits[i] & np.int32(0x7FFFFFFF)
            largest = max(largest, magnitude)
        absmax.view(np.int32)[block] = largest
        factor = _ONE / max(absmax[block], _SMALLEST_ABSMAX) if absmax[block] == absmax[block] else absmax[block]
        for i in range(start, start + _BLOCK):
            values[i] = min(max(values[i] * factor, -_ONE), _ONE) if factor == factor else factor


@_compiled
def encode_pairs(scaled: NDArray[np.generic], midpoints: NDArray[np.generic], codes: NDArray[np.generic]) -> None:
    """Codes of four bits, two in a byte."""
    ranks = np.empty(_BLOCK, np.uint8)
    for block in range(scaled.size // _BLOCK):
        part = scaled[block * _BLOCK : (block + 1) * _BLOCK]
        for i in range(_BLOCK):
            rank = np.uint8(0)
            for k in range(15):
                rank += np.uint8(not part[i] <= midpoints[k])
            ranks[i] = rank
        for i in range(_BYTES):
            codes[block * _BYTES + i] = (ranks[2 * i] << 4) | ranks[2 * i + 1]


@_compiled
def encode_bytes(scaled: NDArray[np.generic], midpoints: NDArray[np.generic], codes: NDArray[np.generic]) -> None:
    """Codes of eight bits, for levels at equal distances: the one that rounding gives, or a neighbour."""
    last = midpoints.size
    for i in range(scaled.size):
        number = scaled[i]
        if not number <= _ONE:
            codes[i] = last
            continue
        code = np.int32(number * _SPAN + _SPAN)
        code += code < last and not number <= midpoints[min(code, last - 1)]
        code -= code > 0 and number <= midpoints[max(code - 1, 0)]
        codes[i] = code


@_compiled
def look_up_pairs(codes: NDArray[np.generic], table: NDArray[np.generic], out: NDArray[np.generic]) -> None:
    """The values of codes of four bits; ``table`` has 16 for each block, in the words of ``out``."""
    for block in range(table.shape[0]):
        of_block = table[block]
        first = block * _BLOCK
        for i in range(_BYTES):
            byte = codes[block * _BYTES + i]
            out[first + 2 * i] = of_block[byte >> 4]
            out[first + 2 * i + 1] = of_block[byte & 15]


@_compiled
def widen_bytes(codes: NDArray[np.generic], absmax: NDArray[np.generic], out: NDArray[np.generic]) -> None:
    """The float32 values of codes of eight bits."""
    for block in range(absmax.size):
        factor = absmax[block]
        for i in range(block * _BLOCK, (block + 1) * _BLOCK):
            out[i] = (np.float32(codes[i]) - _SPAN) / _SPAN * factor
