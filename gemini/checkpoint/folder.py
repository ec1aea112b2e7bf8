"""Folders: made, locked and forced to the disk, on file systems that cannot do all of it too."""

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_UNSUPPORTED = (errno.EBADF, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
"""What file systems answer that cannot sync a folder (CIFS, some of FUSE)."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of linux/fcntl.h and linux/fs.h
_SMALL_BYTES = 1 << 20
_BUSY = (errno.EAGAIN, errno.EACCES)


def make_folder(folder: Path) -> None:
    """Make a folder with its parents, and force their names to the disk."""
    made = []
    for path in (folder, *folder.parents):
        if path.is_dir():
            break
        made.append(path)
    folder.mkdir(parents=True, exist_ok=True)
    for path in made:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk, where its file system can do that."""
    try:
        fd = open_folder(folder)
    except PermissionError:
        return  # writable and not readable: it cannot be opened, hence not synced
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(fd)


def sync_file(path: Path) -> None:
    """Force the bytes of a file that somebody else has written to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def is_same_file(new: Path, old: Path) -> bool:
    """Whether two small files have the same bytes; False if there is no old one, or it cannot be read."""
    try:
        size = new.stat().st_size
        return size == old.stat().st_size <= _SMALL_BYTES and new.read_bytes() == old.read_bytes()
    except OSError:
        return False


def replace_folder(new: Path, folder: Path) -> None:
    """Put ``new`` in the place of ``folder``, which has its name afterwards if it was there; force that to the disk.

    Where the system cannot exchange two names, the old folder has the name of `kept_aside` for a moment.
    """
    if not folder.exists():
        os.rename(new, folder)
    elif not _exchange(new, folder):
        aside = kept_aside(folder)
        os.rename(folder, aside)
        try:
            os.rename(new, folder)
        except BaseException:
            os.rename(aside, folder)
            raise
        os.rename(aside, new)
    sync_folder(folder.parent)


def kept_aside(folder: Path) -> Path:
    """Where an old folder is while it is replaced, if two names cannot be exchanged; a kill may leave it there."""
    return folder.with_name(f".{folder.name}.replaced")


def bring_back(folder: Path) -> None:
    """Undo what a kill in `replace_folder` has left of this folder, if anything."""
    aside = kept_aside(folder)
    if aside.exists() and not folder.exists():
        os.rename(aside, folder)
    elif aside.exists():
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one instant; False where that cannot be done. Python has no function for it."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    if (error := ctypes.get_errno()) in (*_UNSUPPORTED, errno.EPERM):
        return False
    raise OSError(error, os.strerror(error), str(other))


def open_folder(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def try_lock(fd: int) -> bool | None:
    """Lock an open folder for this process without waiting; closing it unlocks it.

    Returns
    -------
    bool or None
        False if another holder has locked it, None if its file system has no locks.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _BUSY else None
    return True


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, waiting for it; nothing where its file system has no locks."""
    try:
        fd = open_folder(folder)
    except PermissionError:
        yield
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError:
            pass  # no locks here; loading compares the ids of files that belong together
        yield
    finally:
        os.close(fd)
