"""Stacks of threads: all of one counts against RLIMIT_DATA and RLIMIT_AS, however little of it is used."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

IO_STACK_BYTES = 1 << 19
"""Enough for threads that only read and write."""
_USUAL_BYTES = 8 << 20
_GLIBC_BYTES = 2 << 20
"""Where RLIMIT_STACK is infinite."""


def small_stacks(nbytes: int = IO_STACK_BYTES) -> AbstractContextManager[None]:
    """Threads that are started meanwhile have stacks of so many bytes; 0: as they would have.

    Python has this for the whole process: a thread that another thread starts just now gets the same.
    """
    return _stacks_of(nbytes) if nbytes else nullcontext()


@contextmanager
def _stacks_of(nbytes: int) -> Iterator[None]:
    before = threading.stack_size(nbytes)
    try:
        yield
    finally:
        threading.stack_size(before)


def default_stack_bytes() -> int:
    """Of a thread for which nobody has said anything."""
    try:
        import resource
    except ImportError:  # not on Unix
        return _USUAL_BYTES
    soft, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return _GLIBC_BYTES if soft == resource.RLIM_INFINITY else int(soft)
