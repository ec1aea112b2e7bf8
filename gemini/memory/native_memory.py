"""What native libraries keep of RAM beyond what tensors take, and how to make them keep less.

**malloc.** glibc takes a freed block of up to 32 MiB for a sign that there will be more of its kind and no longer gives
such blocks back; the holes between those that live hold no larger ones. Training on the CPU then takes up to twice as
much for activations and temporaries as they are (measured: 1.02 to 2.0 times, five architectures, docs/benchmarks.md).
With a fixed threshold of `EXACT_BYTES` each larger block is mapped by itself and unmapped when it is freed: exact, but
its pages are made anew each time, which costs up to half of a small model's step. So RAM is exact while it is measured
and for as long as it is short, and quick where there is room for what malloc may keep.

::

    exact --measured, and there is room--> quick
    exact <--a heavier batch is measured, or memory ran out-- quick

**Threads.** Limits on address space (RLIMIT_DATA, RLIMIT_AS) count all of a stack, 8 MiB by default, of which a page or
two are used: `stack_bytes` of the threads that a training starts.

**oneDNN.** It and torch's wrapper of it each keep the last 1024 kernels that were compiled, one a shape: 0.6 MiB of RAM
and 1.1 MiB of RLIMIT_DATA each (measured). Experts, which get another number of tokens at each step, and batches of
ever new lengths fill that: 70 to 90 MiB a step. Those never come again and a model needs some dozens, so the last
`KERNELS_KEPT` are enough.
"""

import ctypes
import functools
import os

from ..chunk import FETCH_WORKERS
from ..chunk.disk_tuning import DEPTHS
from ..stacks import IO_STACK_BYTES, default_stack_bytes

EXACT_BYTES = 64 << 10
"""Larger blocks are mapped by themselves."""
QUICK_BYTES = 32 << 20
QUICK_TRIM_BYTES = 64 << 20
"""Where glibc's own thresholds end up after a large block has been freed."""
KEPT_RATIO = 2.5
"""What quick training may take, relative to what it needs; the most that was measured is 2.1."""
KERNELS_KEPT = 256
_UPDATE_THREADS = 2
"""The one that computes, and the one that sets it up, whose stack glibc keeps for another."""
_IO_THREADS = FETCH_WORKERS + 4
"""Two that stream an update, telemetry, and the one that ends others."""
_DISK_THREADS = max(DEPTHS)
"""One that stores gradients, and those that read and write beside the one that asks."""
_KERNELS_VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_EXACT_TRIM_BYTES = 128 << 10
_USERS_CHOICES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def give_back_free() -> None:
    """Have malloc give the pages of freed blocks back to the system now.

    Being exact after having been quick is not enough: what fits into a hole on the heap is put there, whatever the
    threshold, and its pages stay when it is freed. Takes some 0.2 ms. Does nothing where malloc is not glibc's.
    """
    if _is_ours():
        _call("malloc_trim", 0)


def be_exact() -> None:
    """From now on malloc gives large blocks back to the system when they are freed; what is free goes now.

    Of the whole process, like all of malloc. Does nothing where it is not glibc's, or where environment variables say
    what it is to do.
    """
    if _is_ours():
        _call("mallopt", _M_MMAP_THRESHOLD, EXACT_BYTES)
        _call("mallopt", _M_TRIM_THRESHOLD, _EXACT_TRIM_BYTES)
    give_back_free()


def be_quick() -> None:
    """From now on malloc keeps blocks, as it does by itself."""
    if _is_ours():
        _call("mallopt", _M_MMAP_THRESHOLD, QUICK_BYTES)
        _call("mallopt", _M_TRIM_THRESHOLD, QUICK_TRIM_BYTES)


def has_room_to_be_quick(free_bytes: int, growth_bytes: int, non_model_bytes: int) -> bool:
    """Whether malloc may keep what it likes.

    Parameters
    ----------
    free_bytes
        RAM that this process may still take, now, between two steps.
    growth_bytes
        What model data may take of it.
    non_model_bytes
        What a step needs besides, at its peak.
    """
    return free_bytes - growth_bytes >= KEPT_RATIO * non_model_bytes


def bound_kernels() -> None:
    """Have oneDNN keep fewer kernels, unless the user has said how many. Too late once it has compiled the first."""
    for name in _KERNELS_VARIABLES:
        os.environ.setdefault(name, str(KERNELS_KEPT))


def stack_bytes(uses_disk: bool) -> int:
    """What the threads that a training starts take of such limits; those of libraries compute in any training."""
    reading = _IO_THREADS + (_DISK_THREADS if uses_disk else 0)
    return _UPDATE_THREADS * default_stack_bytes() + reading * IO_STACK_BYTES


def _is_ours() -> bool:
    # malloc_trim is glibc's own: musl and others have neither.
    return _library() is not None and not any(name in os.environ for name in _USERS_CHOICES)


def _call(name: str, *arguments: int) -> None:
    getattr(_library(), name)(*arguments)


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # not Linux
        return None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
