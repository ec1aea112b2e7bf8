"""The memory hierarchy: where bytes may live."""

from enum import Enum


class Tier(Enum):
    """A kind of memory, fastest first."""

    DEVICE = "device"
    """What computes: a CUDA device, or RAM on a box without one."""

    HOST = "host"
    """RAM."""

    DISK = "disk"
    """A folder."""

    __hash__ = object.__hash__  # tiers are looked up at each move, and Enum's own is written in Python
