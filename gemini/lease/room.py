"""How much of the RAM that a process may take is for model data, and the other way round. Pure."""

HOST_SHARE = 0.8
NON_MODEL_HOST_BYTES = 256 << 20
"""RAM that a small training process takes besides model data, for the smallest model, too: thread stacks, the step
kernel's compilation, oneDNN's code and scratch, what malloc keeps. Under RLIMIT_DATA on two threads a GPT of 3.7M
parameters took 150 to 200 MiB besides its model data (a coarse difference of VmData); the rest is for activations."""
LEAST_SHARE = 0.25


def capacity_of(room_bytes: int, fraction: float = HOST_SHARE, spare_bytes: int = NON_MODEL_HOST_BYTES) -> int:
    """What model data may take of ``room_bytes`` of RAM.

    A share of a small room leaves less than every process needs (a thread that cannot start ends it): at least
    ``spare_bytes`` are left too, though never more than three quarters of the room.
    """
    share, rest = int(room_bytes * fraction), room_bytes - spare_bytes
    least = min(share, int(room_bytes * LEAST_SHARE))
    return share if share <= rest else max(least, rest)


def room_of(capacity_bytes: int) -> int:
    """The least room of which model data may take this much: the inverse of `capacity_of`."""
    nbytes = max(-int(-capacity_bytes // HOST_SHARE), capacity_bytes + NON_MODEL_HOST_BYTES)
    return min(nbytes, -int(-capacity_bytes // LEAST_SHARE))
