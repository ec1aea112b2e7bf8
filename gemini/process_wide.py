"""Everything that we set for the whole process.

=========================  ==================================================  =======================================
what                       set                                                 undone
=========================  ==================================================  =======================================
malloc's thresholds        `return_freed_memory`: in boost, and while a batch  `keep_freed_memory`, after the
                           is measured                                         measurement where RAM is not short
oneDNN's kernels           `bound_kernels`: in boost, unless the user has set  never: read once, at the first kernel
                           the variables
stacks of new threads      `small_stacks`: while a thread of ours is started   at the end of the context
torch's number of threads  `compute_on_this_thread`: on threads of ours        for the process, before it returns
environment variables      `set_variables`: those that torchrun sets, when a   never: other libraries read them
                           task of Slurm is launched
signal handlers            ``signals.py``: `signals_to` in ``gemini-stat top`` at the end of the context
                           and training by command, `uninterrupted` while our
                           code runs
calls at exit and fork     `at_exit`, `at_exit_of_forked`, `before_fork`,      never: they look for what is alive
                           `after_fork_in_child`: when their modules are
                           imported; in a launch
=========================  ==================================================  =======================================

Only `lazy` sets more: functions of torch that read weights, while a ``LazyInitContext`` is open (``interception.py``),
and torch's default dtype, while a recorded operation is replayed (``replay.py``).

**malloc.** glibc takes a freed block of up to 32 MiB for a sign that there will be more of its kind and no longer gives
such blocks back; the holes between those that live hold no larger ones. Training on the CPU then takes up to twice as
much for activations and temporaries as they are (measured: 1.02 to 2.0 times, five architectures, docs/benchmarks.md).
With a fixed threshold of `EXACT_BYTES` each larger block is mapped by itself and unmapped when it is freed: exact, but
its pages are made anew each time, which costs up to half of a small model's step. So freed memory is returned while RAM
is measured and for as long as it is short, and kept where there is room for it.

::

    returned --measured, and there is room--> kept
    returned <--a heavier batch is measured, or memory ran out-- kept

Where it is kept, holes between activations that live would still be there when backward begins, at the peak of a step.
`trim_large_holes` gives them back then, if they are large.

**oneDNN.** It and torch's wrapper of it each keep the last 1024 kernels that were compiled, one a shape: 0.6 MiB of RAM
and 1.1 MiB of RLIMIT_DATA each (measured). Experts, which get another number of tokens at each step, and batches of
ever new lengths fill that: 70 to 90 MiB a step. Those never come again and a model needs some dozens, so the last
`KERNELS_KEPT` are enough.

**Stacks.** Limits on address space (RLIMIT_DATA, RLIMIT_AS) count all of a thread's stack, however little is used.
"""

import atexit
import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from multiprocessing import util
from typing import Generic, TypeVar

T = TypeVar("T")

EXACT_BYTES = 64 << 10
"""Larger blocks are mapped by themselves while freed memory is returned."""
_EXACT_TRIM_BYTES = 128 << 10
KEPT_BYTES = 32 << 20
KEPT_TRIM_BYTES = 64 << 20
"""Where glibc's own thresholds end up after a large block has been freed."""
KEPT_RATIO = 2.5
"""What training may take while freed memory is kept, relative to what it needs; the most that was measured is 2.1."""
HOLES_BYTES = 48 << 20
"""What malloc may keep through the peak of a step. Short steps have less, and would feel that its pages come anew: with
32 MiB a GPT of 12 layers of 256, whose gradients are 37 MiB, takes 1.15 times as long (measured)."""
KERNELS_KEPT = 256
_KERNELS_VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_USERS_CHOICES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")

IO_STACK_BYTES = 1 << 19
"""Enough for threads that only read and write."""
_USUAL_STACK_BYTES = 8 << 20
_GLIBC_STACK_BYTES = 2 << 20
"""Where RLIMIT_STACK is infinite."""


# -- malloc


def trim_freed_memory() -> None:
    """Have malloc give the pages of freed blocks back to the system now.

    `return_freed_memory` does not reach all: what fits into a hole on the heap is put there, whatever the threshold,
    and its pages stay when it is freed. Takes some 0.2 ms. Does nothing where malloc is not glibc's.

    What is free at the end of another thread's arena stays (measured: 17 MiB) until that arena frees a block again.
    """
    if _is_ours():
        _call("malloc_trim", 0)


def trim_large_holes() -> None:
    """`trim_freed_memory` if that is more than `HOLES_BYTES`. Asking takes some 10 us."""
    if _is_ours() and _holes_bytes() > HOLES_BYTES:
        _call("malloc_trim", 0)


def return_freed_memory() -> None:
    """From now on malloc gives large blocks back to the system when they are freed; what is free goes now.

    Does nothing where malloc is not glibc's, or where environment variables say what it is to do.
    """
    if _is_ours():
        _call("mallopt", _M_MMAP_THRESHOLD, EXACT_BYTES)
        _call("mallopt", _M_TRIM_THRESHOLD, _EXACT_TRIM_BYTES)
    trim_freed_memory()


def keep_freed_memory() -> None:
    """From now on malloc keeps blocks, as it does by itself."""
    if _is_ours():
        _call("mallopt", _M_MMAP_THRESHOLD, KEPT_BYTES)
        _call("mallopt", _M_TRIM_THRESHOLD, KEPT_TRIM_BYTES)


def can_keep_freed_memory(free_bytes: int, growth_bytes: int, non_model_bytes: int) -> bool:
    """True if there is room for what malloc keeps.

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


@functools.cache
def _is_ours() -> bool:
    # The variables are those that malloc has read when the process began.
    # malloc_trim is glibc's own: musl and others have neither.
    return _library() is not None and not any(name in os.environ for name in _USERS_CHOICES)


def _call(name: str, *arguments: int) -> None:
    getattr(_library(), name)(*arguments)


class _Mallinfo2(ctypes.Structure):
    """``struct mallinfo2``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
        )
    ]  # fmt: skip


def _holes_bytes() -> int:
    """Bytes of freed blocks that malloc has, whether they have pages or not; 0 if it does not tell (before 2.33)."""
    mallinfo2 = getattr(_library(), "mallinfo2", None)
    if mallinfo2 is None:
        return 0
    mallinfo2.restype = _Mallinfo2
    return int(mallinfo2().fordblks)


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # not Linux
        return None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


# -- oneDNN


def bound_kernels() -> None:
    """Have oneDNN keep fewer kernels, unless the user has said how many. Too late once it has compiled the first."""
    for name in _KERNELS_VARIABLES:
        os.environ.setdefault(name, str(KERNELS_KEPT))


# -- threads


_NICENESS = 15
"""Of threads that give way: where all cores are busy each gets 3.5 % of one."""


def give_way() -> None:
    """Have the calling thread run behind all others of the process where the system can do that (Linux)."""
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
    except (OSError, AttributeError):
        pass  # it competes with the others


def small_stacks(nbytes: int = IO_STACK_BYTES) -> AbstractContextManager[None]:
    """A context in which threads that are started have stacks of ``nbytes``; 0: of the default size.

    Python has one size for the whole process: a thread that another thread starts just now gets the same. Contexts of
    several threads come one after the other, else the last would restore what another has set.
    """
    return _stacks_of(nbytes) if nbytes else nullcontext()


_starting = threading.RLock()


def _renew_lock() -> None:
    """In a forked child, which does not have the thread that held it."""
    global _starting
    _starting = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


@contextmanager
def _stacks_of(nbytes: int) -> Iterator[None]:
    with _starting:
        before = threading.stack_size(nbytes)
        try:
            yield
        finally:
            threading.stack_size(before)


def default_stack_bytes() -> int:
    """The stack of a thread that is started outside of `small_stacks`."""
    try:
        import resource
    except ImportError:  # not on Unix
        return _USUAL_STACK_BYTES
    soft, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return _GLIBC_STACK_BYTES if soft == resource.RLIM_INFINITY else int(soft)


def compute_on_this_thread(get_num_threads: Callable[[], int], set_num_threads: Callable[[int], None]) -> None:
    """Have torch run the operations of the calling thread on this thread alone, for good.

    Each thread that calls torch has OpenMP start a team of its own, as large as the process's number of threads. Teams
    of background threads compete with the one that trains: their members spin at the end of every operation.

    ``torch.set_num_threads`` sets both this thread's number and the one with which new threads begin; a thread that
    lives for that alone puts the latter back.

    Parameters
    ----------
    get_num_threads, set_num_threads
        Those of torch, without which this module is imported by `gemini.stat`.
    """
    of_process = get_num_threads()  # asking is what gives a new thread its number; later, it would undo this
    set_num_threads(1)
    restoring = threading.Thread(target=set_num_threads, args=(of_process,))
    try:
        restoring.start()
    except BaseException:
        set_num_threads(of_process)  # all threads to come would compute alone
        raise
    restoring.join()


# -- environment


def set_variables(**variables: str | int) -> None:
    """Set environment variables of this process."""
    os.environ.update({name: str(value) for name, value in variables.items()})


# -- exit, fork


def at_exit(call: Callable[[], object]) -> None:
    """Have something called when the interpreter ends."""
    atexit.register(call)


def at_exit_of_forked(call: Callable[[], object]) -> None:
    """Have a function of a module called when a process ends that ``multiprocessing`` has forked.

    Such a process runs no exit handlers. An exception that ends it is the one that is being handled then.
    """
    # It forgets all finalizers in the child, and then calls what is registered for after a fork.
    util.register_after_fork(call, lambda given: util.Finalize(None, given, exitpriority=0))


def before_threads_end(call: Callable[[], object]) -> None:
    """Have something called when the main thread has ended, and pools of threads still take work."""
    register: Callable[[Callable[[], object]], None] | None = getattr(threading, "_register_atexit", None)
    if register is not None:  # CPython's own, by which concurrent.futures ends its pools; the last one is called first
        register(call)
    else:
        atexit.register(call)


def before_fork(call: Callable[[], object]) -> None:
    """Have something called in the parent before each fork, where there are forks."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=call)


def after_fork_in_child(call: Callable[[], object]) -> None:
    """Have something called in the child after each fork, where there are forks."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=call)


class PerProcess(Generic[T]):
    """One object for the whole process, made when it is first asked for.

    A forked child makes its own: threads do not survive a fork.

    Parameters
    ----------
    make
        Makes it.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: tuple[int, T] | None = None
        self._lock = threading.Lock()
        after_fork_in_child(self._renew_lock)

    def get(self) -> T:
        """The object of this process."""
        with self._lock:
            if self._made is None or self._made[0] != os.getpid():
                self._made = (os.getpid(), self._make())
            return self._made[1]

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()  # another thread of the parent may have held it
