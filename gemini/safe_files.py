"""Files that may not be what we left there: read with a limit, written without following anybody's links.

In a folder that others may write to, a name of ours may be a link to another file, a pipe that never ends, a device, or
a file of 1 GB. `read_file` and `open_regular` refuse all that is no regular file before a byte is read, and `read_file`
reads no more than it is allowed to. `open_own` and `replace_file` write only to files that are ours alone: a new file,
or one of this user with a single name.

Names are looked up below a descriptor of their folder where one is given, so that it does not matter whether somebody
puts another folder in its place meanwhile.
"""

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

OWN_FOLDER, OWN_FILE = 0o700, 0o600
"""Modes of what nobody else has to see."""
USERS_FILE = 0o666
"""Mode, less the umask, of what a user asks for."""
_ROOT = 0
_MORE_BYTES = 1 << 16
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_ALIEN = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY


class NotOurs(OSError):
    """A file or folder that somebody else has put in the place of ours."""


# -- reading


def open_regular(path: "Path | str", folder: int | None = None) -> int:
    """A descriptor for reading; opening a pipe does not wait for its writer.

    Raises
    ------
    OSError
        As the system says, or if it is no regular file.
    """
    descriptor = os.open(path, _READ, dir_fd=folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return descriptor


def read_file(path: "Path | str", most_bytes: int, folder: int | None = None) -> bytes:
    """All of a regular file.

    Raises
    ------
    OSError
        As the system says, or if it is no regular file, or has more than ``most_bytes``.
    """
    with open(open_regular(path, folder), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= most_bytes:
            data = file.read(size + 1)
            # Files of /proc say that they have 0 bytes, others grow. Not read(limit), which takes that memory first.
            while len(data) <= most_bytes and (more := file.read(_MORE_BYTES)):
                data += more
            if len(data) <= most_bytes:
                return data
    raise OSError(errno.EFBIG, f"it has more than {most_bytes} bytes", str(path))


def read_text(path: "Path | str", most_bytes: int, errors: str = "strict") -> str:
    """The same as text.

    Raises
    ------
    OSError
        As `read_file`.
    UnicodeDecodeError
        If it is no UTF-8.
    """
    return read_file(path, most_bytes).decode(errors=errors)


# -- folders


def make_own_folder(path: Path, ours: int = 1) -> None:
    """Make a folder that nobody else has to see, unless it is there.

    Parameters
    ----------
    ours
        How many names at the end of the path are ours: new ones are private, and old ones must be sound.

    Raises
    ------
    NotOurs
        If one of our names leads to what another user owns, to what all may write to, or is a link of another user.
        Root may use the folder of a user, as in a container.
    OSError
        As the system says.
    """
    parts = [path, *path.parents][:ours]
    parts[-1].parent.mkdir(parents=True, exist_ok=True)
    for part in reversed(parts):
        with suppress(FileExistsError):
            part.mkdir(mode=OWN_FOLDER)
        refuse_link(part)
        status = os.stat(part)
        if not stat.S_ISDIR(status.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(part))
        is_open = status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX
        if is_open or (status.st_uid not in (os.geteuid(), _ROOT) and os.geteuid() != _ROOT):
            raise NotOurs(errno.EPERM, "it must belong to this user and be writable to nobody else", str(part))


def refuse_link(path: Path) -> None:
    """Raise `NotOurs` if a path is a link that another user has made. Links of this user are as good as folders."""
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode) and status.st_uid not in (os.geteuid(), _ROOT):
        raise NotOurs(errno.EPERM, "it is a link that another user has made", str(path))


@contextmanager
def opened_folder(path: Path) -> Iterator[int]:
    """A descriptor of a folder, as `open_folder` gives it."""
    descriptor = open_folder(path)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_folder(path: Path) -> int:
    """A descriptor of a folder, for `open_own` and `replace_file`.

    Raises
    ------
    NotOurs
        If it is a link that another user has made.
    OSError
        As the system says.
    """
    refuse_link(path)
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


# -- writing


def open_own(name: "Path | str", flags: int, folder: int | None = None) -> int:
    """Open a file of this user alone for writing, or make it; ``flags`` say how it is opened.

    Raises
    ------
    NotOurs
        If it is a link, a pipe, another user's, or has a second name by which it may be another file.
    OSError
        As the system says.
    """
    with suppress(FileExistsError):
        return os.open(name, flags | os.O_CREAT | os.O_EXCL | _ALIEN, OWN_FILE, dir_fd=folder)
    try:
        descriptor = os.open(name, flags | _ALIEN, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise NotOurs(error.errno, "it is a link, a pipe or a folder", str(name)) from error
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_nlink != 1:
        os.close(descriptor)
        raise NotOurs(errno.EPERM, "it is not a file of this user alone", str(name))
    return descriptor


def write_draft(name: str, content: bytes, folder: int | None = None) -> str:
    """A new file beside ``name`` that nobody can foresee the name of; that name. A full disk leaves nothing behind.

    Raises
    ------
    OSError
        As the system says.
    """
    draft, descriptor = _new_draft(name, folder, OWN_FILE)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
    except OSError:
        os.unlink(draft, dir_fd=folder)
        raise
    return draft


def replace_file(name: "Path | str", content: bytes, folder: int | None = None, mode: int = OWN_FILE) -> None:
    """Put a whole file in place, atomically. What was there, a link too, is replaced and not written to.

    Raises
    ------
    OSError
        As the system says.
    """
    with replacing(name, folder, mode) as file:
        file.write(content)


@contextmanager
def replacing(name: "Path | str", folder: int | None = None, mode: int = OWN_FILE) -> Iterator[IO[bytes]]:
    """A file to be written, which takes its place as in `replace_file` if all goes well and else is gone.

    Raises
    ------
    OSError
        As the system says.
    """
    draft, descriptor = _new_draft(os.fspath(name), folder, mode)
    try:
        with open(descriptor, "wb") as file:
            yield file
        os.replace(draft, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        os.unlink(draft, dir_fd=folder)
        raise


def _new_draft(name: str, folder: int | None, mode: int) -> tuple[str, int]:
    parent, own = os.path.split(name)
    draft = os.path.join(parent, f".{own[:200]}.{os.getpid()}.{secrets.token_hex(4)}")
    return draft, os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _ALIEN, mode, dir_fd=folder)
