"""What the system refuses a process, memory, threads, open files: which limit is the cause, and what to raise it by.

[Note: Refused threads]
Python says "can't start new thread" for two faults with different cures: there is no memory for the thread's stack, all
of which counts against RLIMIT_DATA and RLIMIT_AS, or there are as many threads as the user, or the control group, may
have. Which one it was is seen from what is left of memory.
"""

import errno
from pathlib import Path

from .errors import GeminiError, LimitError, OutOfMemory
from .process_wide import default_stack_bytes
from .sizes import format_bytes

MORE_FILES = 256
MORE_THREADS = 64
MORE_STACKS_BYTES = 128 << 20
"""The stacks of all threads that a training starts, and of those of libraries."""
_SLACK_BYTES = 1 << 20
_MEMORY = (("RLIMIT_DATA", "VmData:"), ("RLIMIT_AS", "VmSize:"))


def refused_thread(error: BaseException, stack_bytes: int = 0, root: Path = Path("/")) -> GeminiError:
    """The error to raise where a thread could not be started. See [Note: Refused threads].

    Parameters
    ----------
    stack_bytes
        Of the thread; 0 for the default.
    """
    stack = stack_bytes or default_stack_bytes()
    for name, usage in _MEMORY:
        soft, used = soft_limit(name), (_status(usage, root) or 0) * 1024
        if soft is not None and soft - used < stack + _SLACK_BYTES:
            return OutOfMemory(
                f"host tier out of memory. The system refuses a worker thread its stack of {format_bytes(stack)} "
                f"({error}): {name} ({format_bytes(soft)}) leaves less; raise {name} by {MORE_STACKS_BYTES} bytes or "
                "more, or lower host_memory, so that more of the limit is left for stacks and activations"
            )
    allowed = soft_limit("RLIMIT_NPROC")
    said = "any number of" if allowed is None else str(allowed)
    return LimitError(
        f"the system refuses this process another thread ({error}); it has {_status('Threads:', root) or '?'}. "
        f"Its user may have {said} processes and threads (RLIMIT_NPROC), and its control group as many as pids.max "
        f"says; raise RLIMIT_NPROC (ulimit -u) by {MORE_THREADS} or more, or pids.max where that is lower"
    )


def refused_file(error: OSError) -> LimitError | None:
    """The error to raise in the place of one for too many open files; None for any other."""
    if error.errno not in (errno.EMFILE, errno.ENFILE):
        return None
    if error.errno == errno.ENFILE:
        return LimitError(f"the machine has as many open files as it may have ({error}); raise fs.file-max")
    allowed = soft_limit("RLIMIT_NOFILE")
    return LimitError(
        f"the system refuses this process another open file ({error}), it may have {allowed} (RLIMIT_NOFILE); "
        f"raise RLIMIT_NOFILE (ulimit -n) by {MORE_FILES} or more"
    )


def refused(error: BaseException) -> GeminiError | None:
    """The error to raise in the place of the system's refusal of a thread or a file; None for anything else."""
    if isinstance(error, GeminiError):
        cause = error.__cause__ or error.__context__
        return refused_file(cause) if isinstance(cause, OSError) else None
    if isinstance(error, OSError):
        return refused_file(error)
    return refused_thread(error) if is_refused_thread(error) else None


def is_refused_thread(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and "can't start new thread" in str(error)


def soft_limit(name: str) -> int | None:
    """A limit of this process, by its name in `resource`; None if there is none."""
    try:
        import resource
    except ImportError:  # not on Unix
        return None
    soft, _ = resource.getrlimit(getattr(resource, name))
    return None if soft == resource.RLIM_INFINITY else int(soft)


def _status(begins: str, root: Path) -> int | None:
    """The number in the line of ``/proc/self/status`` that begins so."""
    try:
        lines = (root / "proc/self/status").read_text().splitlines()
    except OSError:  # not Linux
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(begins)), None)
