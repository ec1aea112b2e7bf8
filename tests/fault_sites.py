"""Places where one operation of the system can be made to fail, once: memory, threads, files, the disk."""

import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import thread as pools
from contextlib import contextmanager
from typing import Any

import numpy
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gemini.chunk import DiskBackend
from gemini.chunk.disk_file import DiskFile
from gemini.chunk.memory import RamBackend

try:
    import _testcapi
except ImportError:  # a Python without its own tests
    _testcapi = None

SLOW_SECONDS = 0.2
"""A slow operation waits for an event that nobody sets, for so long."""


class Fault:
    """Counts the operations of one kind, in all threads; the one with the number `arm` was given is to fail."""

    def __init__(self) -> None:
        self.count = 0
        self.is_over = False
        """True if the operation has failed."""
        self._number: int | None = None
        self._is_on = False
        self._lock = threading.Lock()

    def arm(self, number: int | None) -> None:
        """Count from 0 on, and have one operation fail (None: none)."""
        with self._lock:
            self.count, self._number, self.is_over, self._is_on = 0, number, False, True

    def disarm(self) -> None:
        """Count no further, and let nothing fail."""
        self._is_on = False

    def comes(self) -> bool:
        """Another operation; True if it is to fail."""
        with self._lock:
            if not self._is_on:
                return False
            number, self.count = self.count, self.count + 1
            if number == self._number:
                self.is_over = True
            return number == self._number


class Interpreter(Fault):
    """All that Python's own allocators are asked for, by any thread."""

    MOST_UNNOTICED = 25
    """Allocations cannot be counted. When this number in a row has no effect, the step has no more of them."""

    def __init__(self) -> None:
        super().__init__()
        self._unnoticed = 0

    def arm(self, number: int | None) -> None:
        self.is_over = True
        _testcapi.set_nomemory(number, number + 1)

    def disarm(self) -> None:
        _testcapi.remove_mem_hooks()

    def saw(self, has_failed: bool) -> None:
        """What the last one has done."""
        self._unnoticed = 0 if has_failed else self._unnoticed + 1
        self.is_over = self._unnoticed < self.MOST_UNNOTICED


@contextmanager
def interpreter(fault: Fault) -> Iterator[None]:
    """Python's own allocators, which an `Interpreter` arms."""
    yield


def no_tensor() -> BaseException:
    return RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 16384 bytes. Error code 12 (Cannot allocate memory)"
    )


def os_error(number: int) -> Callable[[], BaseException]:
    return lambda: OSError(number, os.strerror(number))


def failing(fault: Fault, call: Callable[..., Any], error: Callable[[], BaseException]) -> Callable[..., Any]:
    """``call``, which raises if that is its turn."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if fault.comes():
            raise error()
        return call(*args, **kwargs)

    return wrapped


class _Allocations(TorchDispatchMode):
    """Every operation that makes a tensor is an allocation."""

    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self._fault = fault

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(ret.alias_info is None for ret in func._schema.returns) and self._fault.comes():
            raise no_tensor()
        return func(*args, **(kwargs or {}))


@contextmanager
def tensors(fault: Fault) -> Iterator[None]:
    """What aten makes, on this thread (which runs backward, too) and on workers."""
    run = pools._WorkItem.run  # type: ignore[attr-defined]

    def counted(item: Any) -> None:
        with _Allocations(fault):
            run(item)

    with pytest.MonkeyPatch.context() as patch, _Allocations(fault):
        patch.setattr(pools._WorkItem, "run", counted)  # type: ignore[attr-defined]
        yield


@contextmanager
def _patched(fault: Fault, *places: tuple[Any, str, Callable[[], BaseException]]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, error in places:
            patch.setattr(owner, name, failing(fault, getattr(owner, name, None) or getattr(__builtins__, name), error))
        yield


def backends(fault: Fault) -> Any:
    """What our own backends are asked for."""
    return _patched(
        fault,
        (RamBackend, "grow", no_tensor),
        (RamBackend, "home", no_tensor),
        (DiskBackend, "_allocate", MemoryError),
    )


def python(fault: Fault) -> Any:
    """Memory that is asked for from Python."""
    return _patched(
        fault,
        (numpy, "empty", MemoryError),
        (mmap, "mmap", lambda: OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))),
        (torch, "empty", no_tensor),
        (torch, "frombuffer", MemoryError),
        (pools.ThreadPoolExecutor, "submit", MemoryError),
        (DiskFile, "_do", MemoryError),
    )


def threads(fault: Fault) -> Any:
    return _patched(fault, (threading.Thread, "start", lambda: RuntimeError("can't start new thread")))


def descriptors(number: int) -> Callable[[Fault], Any]:
    return lambda fault: _patched(fault, (os, "open", os_error(number)))


FILES = ("open", "preadv", "pwritev", "posix_fallocate", "ftruncate", "fsync", "unlink")


def files(number: int) -> Callable[[Fault], Any]:
    """All calls of the system that concern files."""

    return lambda fault: _patched(fault, *((os, name, os_error(number)) for name in FILES))


def short(fault: Fault) -> Any:
    """A read or a write that moves a part of what it was asked for."""
    return _moves(fault, lambda call, fd, buffers, at: call(fd, [buffers[0][: max(len(buffers[0]) // 3, 1)]], at))


def slow(fault: Fault) -> Any:
    """A read or a write that comes late."""

    def late(call: Any, fd: int, buffers: Any, at: int) -> int:
        threading.Event().wait(SLOW_SECONDS)
        return int(call(fd, buffers, at))

    return _moves(fault, late)


def spoils(fault: Fault) -> Any:
    """A write that fails when a part of it has been done, and a read that fails when memory has been changed."""

    def spoilt(call: Any, fd: int, buffers: Any, at: int) -> int:
        if call is PWRITEV:
            call(fd, [bytes(len(buffers[0]))], at)
        else:
            buffers[0][:] = b"\xff" * len(buffers[0])
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    return _moves(fault, spoilt)


PWRITEV = os.pwritev


@contextmanager
def _moves(fault: Fault, instead: Callable[[Any, int, Any, int], int]) -> Iterator[None]:
    def wrapped(call: Any) -> Any:
        def move(fd: int, buffers: Any, at: int) -> int:
            return instead(call, fd, buffers, at) if fault.comes() else int(call(fd, buffers, at))

        return move

    with pytest.MonkeyPatch.context() as patch:
        for name in ("preadv", "pwritev"):
            patch.setattr(os, name, wrapped(getattr(os, name)))
        yield


ALLOCATIONS: dict[str, Callable[[Fault], Any]] = {
    "tensors": tensors,
    "backends": backends,
    "python": python,
    "threads": threads,
    **({"interpreter": interpreter} if hasattr(_testcapi, "set_nomemory") else {}),
    "EMFILE": descriptors(errno.EMFILE),
    "ENFILE": descriptors(errno.ENFILE),
}
DISK: dict[str, Callable[[Fault], Any]] = {
    "EIO": files(errno.EIO),
    "ENOSPC": files(errno.ENOSPC),
    "EINTR": files(errno.EINTR),
    "short": short,
    "slow": slow,
    "spoils": spoils,
}
