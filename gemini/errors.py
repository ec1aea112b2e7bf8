"""The exceptions of gemini-memory.

::

    GeminiError
    +-- OutOfMemory          also torch.OutOfMemoryError (hence RuntimeError)
    +-- StateError           a chunk was asked for a transition that does not exist
    +-- CheckpointError      a file that cannot be read or does not match the model
    +-- LazyInitError        a lazy tensor was used in a way that cannot be replayed
    +-- OffloadError         the disk tier could not read or write
    +-- LaunchError          the ranks did not meet
    +-- LimitError           the system allows this process no more threads, or no more open files
    +-- ForkError            a boosted model was used in a forked child, which has none of its threads
    +-- RankError            another rank is gone, late, or does something else
    +-- TornStep             backward failed when update_in_backward had updated some of the parameters

This file is the bottom of the import order: it imports nothing of ours, so ``chunk`` and ``lazy`` may use it.
User mistakes (a bad argument) are ``ValueError`` and ``TypeError``.
"""

import errno

import torch


class GeminiError(Exception):
    """Base of every error raised by gemini-memory itself."""


class OutOfMemory(GeminiError, torch.OutOfMemoryError):
    """A tier has no room left. The message names the tier, the need, what is free and what to change."""


class StateError(GeminiError, RuntimeError):
    """A chunk was asked for a state transition that its table does not allow: a bug of ours."""


class CheckpointError(GeminiError, RuntimeError):
    """A checkpoint cannot be read, or does not match the model. Nothing has been changed when it is raised."""


class LazyInitError(GeminiError, RuntimeError):
    """A lazy tensor was used in a way that cannot be recorded and replayed."""


class OffloadError(GeminiError, OSError):
    """Reading or writing the disk tier failed. Parameters and optimizer states are as they were before the call."""


class LaunchError(GeminiError, RuntimeError):
    """The ranks did not meet within the timeout. There is no process group."""


class LimitError(GeminiError, RuntimeError):
    """The system allows this process no more threads, or no more open files. The message names the limit."""


class ForkError(GeminiError, RuntimeError):
    """A boosted model was used in a forked child of the process that boosted it. Nothing has been changed there."""


class TornStep(GeminiError, RuntimeError):
    """With ``update_in_backward=True`` a backward failed when it had updated some parameters and not others.

    The model refuses to go on until a checkpoint of model and optimizer has been loaded.
    """


class RankError(GeminiError, RuntimeError):
    """Another rank is gone, does not come in time, or does something else than this one. The message names it."""


def is_out_of_memory(error: BaseException) -> bool:
    """True for every shape in which Python and torch report that an allocation failed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, GeminiError):
        return False  # it may quote one of another rank's
    if type(error) is OSError:  # of mmap; ours say what they were about
        return error.errno == errno.ENOMEM
    if not isinstance(error, RuntimeError):
        return False
    return str(error) == _ONEDNN or any(text in str(error) for text in _ALLOCATION_FAILED)


_ALLOCATION_FAILED = ("can't allocate memory", "bad_alloc", "out of memory", "Cannot allocate memory")

_ONEDNN = "could not create a primitive"
"""What oneDNN says when it gets no scratch memory; what it does not support it words otherwise."""
