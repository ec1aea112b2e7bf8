"""The stacks of the threads that a training starts, which count against limits on address space.

RLIMIT_DATA and RLIMIT_AS count all of a stack, 8 MiB by default, of which a page or two are used.
"""

from ..chunk import FETCH_WORKERS
from ..chunk.disk_tuning import DEPTHS
from ..process_wide import IO_STACK_BYTES, default_stack_bytes

_UPDATE_THREADS = 2
"""The one that computes, and the one that sets it up, whose stack glibc keeps for another."""
_IO_THREADS = FETCH_WORKERS + 6
"""Four that stream updates, telemetry, and the one on which others are closed."""
_DISK_THREADS = max(DEPTHS)
"""One that stores gradients, and those that read and write beside the one that asks."""


def stack_bytes(uses_disk: bool) -> int:
    """The stacks of all threads of ours; those of libraries compute in any training."""
    reading = _IO_THREADS + (_DISK_THREADS if uses_disk else 0)
    return _UPDATE_THREADS * default_stack_bytes() + reading * IO_STACK_BYTES
