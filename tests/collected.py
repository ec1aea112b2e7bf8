"""Garbage is gone, all of it."""

import gc

_PASSES = 3


def collect_all() -> None:
    """Collect what cannot be reached: a graph goes with the frames that hold it, and what its hooks hold only then."""
    for _ in range(_PASSES):
        gc.collect()
