"""Moves a generator past numbers that are not needed, without making them.

Most parameters are drawn twice: a layer's own default, then the model's ``_init_weights``. The first draw is dead, but
the generator has to end up where it would leave it. The CPU generator is an MT19937 (Matsumoto and Nishimura, 1998),
which makes 624 words at a time from the 624 before; only that recurrence is needed to get past a draw, not the words'
tempering nor the transform to normal numbers, and it runs in vector registers (fifty times as fast as ``uniform_``,
measured). Compiled by numba on first use: import this module only then.

How many words a draw takes is known for the draws that models consist of, and tried out once on small tensors: should
another version of torch take them differently, the draws run on scratch memory as all others do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from math import prod
from typing import Any

import numpy as np
import torch
from numba import njit

from .rng import HEADER, STATE_NBYTES
from .tape import Record, Value

aten = torch.ops.aten

_logger = logging.getLogger(__name__)
_N, _M = 624, 397
_BYTES_OF_WORDS = slice(HEADER.size, HEADER.size + 8 * _N)


def words(record: Record) -> int | None:
    """Return how many words of a CPU generator a dead draw takes; None if it is not one of those we know."""
    value = record.scratch
    if value is None or value.device.type != "cpu" or value.dtype is not torch.float32:
        return None
    numel = prod(value.shape)
    if record.call is aten.uniform_.default:
        return numel
    if record.call is aten.normal_.default and numel >= 16 and _is_contiguous(value):
        return numel + (16 if numel % 16 else 0)  # the last 16 are drawn again
    return None


def skip(generator: torch.Generator, count: int) -> None:
    """Move a CPU generator `count` words on."""
    if not count:
        return
    state = generator.get_state()
    raw = bytearray(state.numpy().tobytes())
    seed, left, seeded, position = HEADER.unpack_from(raw)
    taken = position + count if left != 1 else _N + count  # left 1: all words of the present block are handed out
    twists, position = divmod(taken - 1, _N)
    key = np.frombuffer(raw, np.uint64, _N, HEADER.size).astype(np.uint32)
    _twist(key, twists)
    HEADER.pack_into(raw, 0, seed, _N - position, seeded, position + 1)
    raw[_BYTES_OF_WORDS] = key.astype(np.uint64).tobytes()
    generator.set_state(torch.frombuffer(raw, dtype=torch.uint8))


@cache
def is_reliable() -> bool:
    """Whether this torch draws as we think it does."""
    draws: list[Callable[[torch.Tensor, torch.Generator], Any]] = [
        lambda tensor, generator: aten.normal_.default(tensor, 0.0, 1.0, generator=generator),
        lambda tensor, generator: aten.uniform_.default(tensor, 0.0, 1.0, generator=generator),
    ]
    for draw, call in zip(draws, (aten.normal_.default, aten.uniform_.default), strict=True):
        for numel in (16, 100, 624, 1300):
            drawn, skipped = torch.Generator().manual_seed(numel), torch.Generator().manual_seed(numel)
            if drawn.get_state().numel() != STATE_NBYTES:
                return False
            probe = torch.empty(numel, dtype=torch.float32, device="cpu")
            value = Value(None, (numel,), (1,), torch.float32, probe.device, True, 0, 0)  # type: ignore[arg-type]
            count = words(Record(kind=None, call=call, scratch=value))  # type: ignore[arg-type]
            for _ in range(2):
                draw(probe, drawn)
                skip(skipped, count or 0)
            if not torch.equal(drawn.get_state(), skipped.get_state()):
                return False
    return True


def _is_contiguous(value: Value) -> bool:
    expected = 1
    for size, step in zip(reversed(value.shape), reversed(value.stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def _twist_blocks(key: Any, times: int) -> None:
    """Replace the 624 words by the next 624, `times` times."""
    upper, lower, one = np.uint32(0x80000000), np.uint32(0x7FFFFFFF), np.uint32(1)
    zero, matrix = np.uint32(0), np.uint32(0x9908B0DF)
    for _ in range(times):
        for i in range(_N - _M):
            mixed = (key[i] & upper) | (key[i + 1] & lower)
            key[i] = key[i + _M] ^ (mixed >> one) ^ ((zero - (mixed & one)) & matrix)
        for i in range(_N - _M, _N - 1):
            mixed = (key[i] & upper) | (key[i + 1] & lower)
            key[i] = key[i - (_N - _M)] ^ (mixed >> one) ^ ((zero - (mixed & one)) & matrix)
        mixed = (key[_N - 1] & upper) | (key[0] & lower)
        key[_N - 1] = key[_M - 1] ^ (mixed >> one) ^ ((zero - (mixed & one)) & matrix)


try:
    _twist: Callable[[Any, int], None] = njit(cache=True, nogil=True)(_twist_blocks)
except RuntimeError as error:
    _logger.info("the compiled twist cannot be kept for the next process: %s", error)
    _twist = njit(nogil=True)(_twist_blocks)
