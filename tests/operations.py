"""Every call by which Python code changes files below a folder, handed to a hook before it happens.

A hook gets a `Call` and a function that carries it out; what it does with that is its own: fail instead, count, record.
Code in C that opens files itself is not seen before it syncs them.
"""

import builtins
import errno
import io
import os
import pathlib
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock


@dataclass(frozen=True)
class Call:
    """A call of the system."""

    kind: str
    """create, open, write, reserve, truncate, fsync, fsync_folder, rename, link, symlink, unlink, rmdir or mkdir."""
    path: Path
    other: Path | None = None
    """Of a rename or a link: the new name."""
    data: bytes = b""
    offset: int = 0
    """Of a write; of `reserve` and `truncate` the length."""

    def __str__(self) -> str:
        names = [self.path.name, *([self.other.name] if self.other is not None else [])]
        return f"{self.kind} {' to '.join(names)}"


@contextmanager
def folder_in_memory() -> Iterator[Path]:
    """A folder whose syncs cost nothing, where there is one: tests sync thousands of times."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


Hook = Callable[[Call, Callable[[], Any]], Any]


@contextmanager
def intercepted(root: Path, hook: Hook) -> Iterator[None]:
    """Within it, ``hook`` sees every call that concerns ``root`` or what is below."""
    calls = _Calls(root, hook)
    owners: list[Any] = [os]
    if hasattr(pathlib, "_NormalAccessor"):  # Python 3.10 keeps functions of `os` there
        owners.append(pathlib._NormalAccessor)
    with ExitStack() as patches:
        for name in _Calls.NAMES:
            for owner in owners:
                if hasattr(owner, name):
                    wrapper = getattr(calls, name)
                    patches.enter_context(
                        mock.patch.object(owner, name, wrapper if owner is os else staticmethod(wrapper))
                    )
        for module in (builtins, io):
            patches.enter_context(mock.patch.object(module, "open", calls.built_in_open))
        yield


_NO_FD: dict[str, Any] = {"dir_fd": None}


class _Calls:
    NAMES = (
        *(
            "open",
            "write",
            "pwrite",
            "writev",
            "pwritev",
            "posix_fallocate",
            "ftruncate",
            "fsync",
            "fdatasync",
            "mkdir",
        ),
        *("rename", "replace", "link", "symlink", "unlink", "remove", "rmdir"),
    )

    def __init__(self, root: Path, hook: Hook) -> None:
        self._root = str(root.resolve())
        self._hook = hook
        self._real = {name: getattr(os, name) for name in self.NAMES}
        self._built_in_open = builtins.open

    # -- names

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        kind = "create" if flags & os.O_CREAT and not os.path.exists(self._full(path, dir_fd)) else "open"
        if kind == "open" and flags & os.O_TRUNC:
            kind = "truncate"
        return self._do(
            Call(kind, self._full(path, dir_fd)), lambda: self._real["open"](path, flags, mode, dir_fd=dir_fd)
        )

    def mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        self._do(Call("mkdir", self._full(path, dir_fd)), lambda: self._real["mkdir"](path, mode, dir_fd=dir_fd))

    def rename(self, source: Any, target: Any, **fds: int | None) -> None:
        call = Call("rename", self._full(source, fds.get("src_dir_fd")), self._full(target, fds.get("dst_dir_fd")))
        self._do(call, lambda: self._real["rename"](source, target, **fds))

    replace = rename

    def link(self, source: Any, target: Any, **options: Any) -> None:
        call = Call("link", self._full(source), self._full(target))
        self._do(call, lambda: self._real["link"](source, target, **options))

    def symlink(self, source: Any, target: Any, *args: Any, **options: Any) -> None:
        call = Call("symlink", self._full(target), data=os.fsencode(source))
        self._do(call, lambda: self._real["symlink"](source, target, *args, **options))

    def unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._do(Call("unlink", self._full(path, dir_fd)), lambda: self._real["unlink"](path, dir_fd=dir_fd))

    remove = unlink

    def rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._do(Call("rmdir", self._full(path, dir_fd)), lambda: self._real["rmdir"](path, dir_fd=dir_fd))

    # -- contents

    def write(self, fd: int, data: Any) -> int:
        if not self._concerns(path := self._of(fd)):
            return self._real["write"](fd, data)
        call = Call("write", path, data=bytes(data), offset=os.lseek(fd, 0, os.SEEK_CUR))
        return self._do(call, lambda: self._real["write"](fd, data))

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        if not self._concerns(path := self._of(fd)):
            return self._real["pwrite"](fd, data, offset)
        call = Call("write", path, data=bytes(data), offset=offset)
        return self._do(call, lambda: self._real["pwrite"](fd, data, offset))

    def writev(self, fd: int, buffers: Any) -> int:
        return self.write(fd, b"".join(map(bytes, buffers)))

    def pwritev(self, fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if not self._concerns(self._of(fd)):
            return self._real["pwritev"](fd, buffers, offset, flags)
        return self.pwrite(fd, b"".join(map(bytes, buffers)), offset)

    def posix_fallocate(self, fd: int, offset: int, length: int) -> None:
        call = Call("reserve", self._of(fd), offset=offset + length)
        self._do(call, lambda: self._real["posix_fallocate"](fd, offset, length))

    def ftruncate(self, fd: int, length: int) -> None:
        self._do(Call("truncate", self._of(fd), offset=length), lambda: self._real["ftruncate"](fd, length))

    def fsync(self, fd: int) -> None:
        kind = "fsync_folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "fsync"
        self._do(Call(kind, self._of(fd)), lambda: self._real["fsync"](fd))

    fdatasync = fsync

    def built_in_open(self, file: Any, mode: str = "r", buffering: int = -1, *args: Any, **options: Any) -> Any:
        """Files that are written go through `os.write`."""
        is_path = not isinstance(file, int) and self._concerns(self._full(file))
        if not is_path or not set(mode) & set("wax+"):
            return self._built_in_open(file, mode, buffering, *args, **options)
        assert "+" not in mode, (file, mode)
        flags = {"w": os.O_TRUNC, "x": os.O_EXCL, "a": os.O_APPEND}[next(c for c in mode if c in "wax")]
        buffered = io.BufferedWriter(_Raw(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | flags, 0o666)))
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, *args, **options)

    # -- which

    def _do(self, call: Call, perform: Callable[[], Any]) -> Any:
        if self._concerns(call.path) or (call.other is not None and self._concerns(call.other)):
            return self._hook(call, perform)
        return perform()

    def _full(self, path: Any, dir_fd: int | None = None) -> Path:
        if isinstance(path, int):
            return self._of(path)
        folder = self._of(dir_fd) if dir_fd is not None else Path.cwd()
        return Path(os.path.normpath(folder / os.fsdecode(path)))

    @staticmethod
    def _of(fd: int) -> Path:
        return Path(os.readlink(f"/proc/self/fd/{fd}"))

    def _concerns(self, path: Path) -> bool:
        return str(path) == self._root or str(path).startswith(self._root + "/")


class _Raw(io.RawIOBase):
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def write(self, data: Any) -> int:
        try:
            return os.write(self._fd, data)
        except Dead:
            return len(data)  # a buffer that is given up writes what it has, which a dead process does not

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.close(self._fd)


# -- hooks


class Dead(BaseException):
    """The process has been killed: whatever it would have done does not happen."""


class Counted:
    """Carries everything out, and remembers it."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def __call__(self, call: Call, perform: Callable[[], Any]) -> Any:
        self.calls.append(call)
        return perform()


class Killed:
    """SIGKILL at the ``n``-th call: neither this one nor any later one happens, whatever the program catches.

    For the files it is the same as a real one: what was written is in the page cache, and locks go with the
    descriptors, whose closing is let through.
    """

    def __init__(self, n: int) -> None:
        self._left = n

    def __call__(self, call: Call, perform: Callable[[], Any]) -> Any:
        if self._left <= 0:
            raise Dead
        self._left -= 1
        return perform()


_NAMING = ("create", "mkdir", "rename", "link", "symlink")
CANNOT: dict[int, tuple[str, ...]] = {
    errno.EIO: (*_NAMING, "write", "reserve", "truncate", "fsync", "fsync_folder", "unlink", "rmdir"),
    errno.ENOSPC: (*_NAMING, "write", "reserve"),
    errno.EROFS: (*_NAMING, "write", "reserve", "truncate", "unlink", "rmdir"),
}
"""What a disk refuses that is broken, full, or has become read-only."""


class Failing:
    """An error of the system at the ``n``-th call, or from it on at every call that such a disk refuses."""

    def __init__(self, n: int, error: int, *, stays: bool = False) -> None:
        self._left = n
        self._error = error
        self._stays = stays

    def __call__(self, call: Call, perform: Callable[[], Any]) -> Any:
        self._left -= 1
        if self._left == -1 or (self._left < 0 and self._stays and call.kind in CANNOT[self._error]):
            raise OSError(self._error, os.strerror(self._error), str(call.path))
        return perform()
