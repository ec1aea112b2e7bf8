"""Which rank writes which tensors: the one that has most of each, and all about as many bytes. Pure.

::

    bytes at home     rank 0   rank 1        rank 0 writes w1 and b1, and asks rank 1 for a half of w1;
    w1                   4        4          rank 1 writes w2
    w2                   0        8
    b1                   1        0
"""

from collections.abc import Sequence
from typing import TypeVar

from .weight_files import into_shards

T = TypeVar("T")

_SLACK = 1.02
"""A rank may have this much more than its share, where that saves reading from others."""


def divided(
    items: Sequence[T],
    sizes: Sequence[int],
    shares: Sequence[Sequence[int]],
    writers: Sequence[int],
    limit: int | None,
) -> list[tuple[int, list[T]]]:
    """Files, as the rank that writes each and what is in it. At least one, for the first writer.

    Parameters
    ----------
    sizes
        Bytes of each item.
    shares
        What each rank has of it; nothing where only the first one is to write it.
    writers
        The ranks that write, the first one first.
    limit
        Bytes of a file, at most, unless one item is larger; None: any number.
    """
    of = writers_of(sizes, shares, writers)
    found: list[tuple[int, list[T]]] = []
    for writer in writers:
        own = [index for index, rank in enumerate(of) if rank == writer]
        kept = [items[index] for index in own]
        files = into_shards(kept, [sizes[index] for index in own], limit) if limit is not None and own else [kept]
        found += [(writer, file) for file in files if file or writer == writers[0]]
    return found


def writers_of(sizes: Sequence[int], shares: Sequence[Sequence[int]], writers: Sequence[int]) -> list[int]:
    """The rank that writes each item; the largest ones are given out first."""
    fair = sum(sizes) / len(writers) * _SLACK
    loads = dict.fromkeys(writers, 0)
    found = [writers[0]] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: (bool(shares[i]), -sizes[i])):
        share = shares[index]
        if share and sizes[index]:
            most = sorted(writers, key=lambda rank: (-share[rank], loads[rank], rank))
            room = (rank for rank in most if loads[rank] + sizes[index] <= fair)
            least = min(writers, key=lambda rank: (loads[rank], rank))
            found[index] = next(room, least)
        loads[found[index]] += sizes[index]
    return found
