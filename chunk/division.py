"""Where a home lies: on one tier, or divided between RAM and disk. Pure: no torch.

::

    exp_avg of a chunk    |-- HOST ---------|-- DISK --------------------------------|
                                            ^ a multiple of DIVISION_BYTES

So one large parameter, such as a tied embedding, is no lump that goes to disk as a whole.
"""

from dataclasses import dataclass

from .tier import Tier

DIVISION_BYTES = 8192
"""Homes are divided at multiples of this: of the pages of a disk, and of all blocks of elements that share a value."""


@dataclass(frozen=True, slots=True)
class Divided:
    """The place of a home whose first part is on HOST and the rest on DISK."""

    host_bytes: int
    """Of the first part. A home that is no longer than this has no other."""

    def __post_init__(self) -> None:
        if self.host_bytes <= 0 or self.host_bytes % DIVISION_BYTES:
            raise ValueError(f"a home is divided at a multiple of {DIVISION_BYTES} bytes, got {self.host_bytes}")


HomeTier = Tier | Divided
"""Where a home lies."""


def parts(where: HomeTier, nbytes: int) -> tuple[tuple[Tier, int], ...]:
    """The parts of a home of this length, in order: the tier and the bytes of each."""
    if not isinstance(where, Divided):
        return ((where, nbytes),)
    if nbytes <= where.host_bytes:
        return ((Tier.HOST, nbytes),)
    return ((Tier.HOST, where.host_bytes), (Tier.DISK, nbytes - where.host_bytes))
