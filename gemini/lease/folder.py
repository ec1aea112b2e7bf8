"""The files of the leases: one each, locked by the process that holds it for as long as that lives.

::

    <state folder>/leases/1234-5f0c.lease    one line of JSON, rewritten in place
    <state folder>/leases/1234-5f0c.ask      something that is asked of its holder, until it follows

A POSIX lock ends with its process, however that ends, so there is nothing to tidy up after a SIGKILL: a file without
its lock counts no longer, and the next run that sees it removes it. Such a lock belongs to the process, not to a
descriptor: a process that closes any descriptor of a file of its own drops its lock, and never sees it. Therefore what
this process holds is remembered here, and its files are not opened again.
"""

import fcntl
import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gemini.lease.standing import Standing, decoded, encoded
from gemini.safe_files import make_own_folder
from gemini.telemetry.layout import runs_folder

_SUFFIX, _ASKED = ".lease", ".ask"
_MOST_BYTES = 1 << 16
_ATTEMPTS = 5


def leases_folder() -> Path:
    """Where the leases of this user are, beside the runs."""
    return runs_folder().with_name("leases")


class Lease:
    """A lease of this process. `LeaseFolder.begin` makes it."""

    def __init__(self, folder: "LeaseFolder", name: str, descriptor: int, standing: Standing) -> None:
        self.name = name
        self.standing = standing
        """What the file says."""
        self._folder = folder
        self._descriptor = descriptor
        self._pid = os.getpid()

    @property
    def is_of_this_process(self) -> bool:
        """False in a forked child, which has no part in the lock."""
        return self._pid == os.getpid()

    def say(self, standing: Standing) -> None:
        """Have the file say something else, unless it says so already."""
        if standing != self.standing and self.is_of_this_process:
            self.standing = standing
            _write(self._descriptor, standing)

    def take_asked(self) -> bytes | None:
        """What was asked of this lease, which is then asked no longer."""
        return self._folder.take(self.name + _ASKED)

    def end(self) -> None:
        """Give back what is leased. Idempotent."""
        if self.is_of_this_process and _held.pop((str(self._folder.path), self.name), None) is self:
            self._folder.remove(self.name + _ASKED, self.name + _SUFFIX)
            os.close(self._descriptor)


_held: dict[tuple[str, str], Lease] = {}
"""The leases of this process, by folder and name: its own locks are invisible to it."""


class LeaseFolder:
    """All leases of this user on this machine, and on others that share the folder.

    Parameters
    ----------
    path
        None: `leases_folder`.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or leases_folder()

    def begin(self, standing: Standing) -> Lease:
        """A new lease of this process.

        Raises
        ------
        OSError
            If the folder cannot be made, belongs to somebody else, or knows no locks.
        """
        make_own_folder(self.path, ours=2)  # gemini-memory and leases
        with self._opened() as folder:
            for _ in range(_ATTEMPTS):
                name = f"{os.getpid()}-{secrets.token_hex(4)}"
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                descriptor = os.open(name + _SUFFIX, flags, 0o600, dir_fd=folder)
                try:
                    fcntl.lockf(descriptor, fcntl.LOCK_EX)
                    if _is_named(descriptor, name + _SUFFIX, folder):  # else it was taken for a dead one and removed
                        _write(descriptor, standing)
                        lease = _held[str(self.path), name] = Lease(self, name, descriptor, standing)
                        return lease
                except BaseException:
                    os.close(descriptor)
                    raise
                os.close(descriptor)
        raise OSError(f"no lease could be begun in {self.path}")

    def standings(self) -> dict[str, Standing]:
        """What all leases say that are held now, by name; those of this process, too. Removes what is dead.

        Empty where there is no folder, or it belongs to somebody else.
        """
        own = {name: lease for (path, name), lease in _held.items() if path == str(self.path)}
        found = {name: lease.standing for name, lease in own.items() if lease.is_of_this_process}
        with suppress(OSError), self._opened() as folder:
            for entry in os.listdir(folder):
                name = entry.removesuffix(_SUFFIX)
                if name != entry and name not in found:
                    said = self._read(folder, entry)
                    if said is not None:
                        found[name] = said
        return found

    def ask(self, name: str, text: bytes) -> None:
        """Leave something for the holder of a lease; what was left before and not taken is replaced."""
        with self._opened() as folder:
            draft = f".{name}.{secrets.token_hex(4)}"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(draft, flags, 0o600, dir_fd=folder)
            try:
                os.write(descriptor, text)
            finally:
                os.close(descriptor)
            os.replace(draft, name + _ASKED, src_dir_fd=folder, dst_dir_fd=folder)

    def withdraw(self, name: str) -> bool:
        """Ask no longer; False if the holder has taken it already."""
        return self.take(name + _ASKED) is not None

    def take(self, entry: str) -> bytes | None:
        """The content of a file, which is removed; None if there is none."""
        with suppress(OSError), self._opened() as folder:
            descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
            try:
                text = os.read(descriptor, _MOST_BYTES) if _is_ours(os.fstat(descriptor)) else None
            finally:
                os.close(descriptor)
            os.unlink(entry, dir_fd=folder)
            return text
        return None

    def remove(self, *entries: str) -> None:
        """Remove files, as far as they are there."""
        with suppress(OSError), self._opened() as folder:
            for entry in entries:
                with suppress(OSError):
                    os.unlink(entry, dir_fd=folder)

    def _read(self, folder: int, entry: str) -> Standing | None:
        """What another process's lease says; None, and the file is gone, if nobody holds it."""
        try:
            descriptor = os.open(entry, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        except OSError:
            return None
        try:
            if not _is_ours(os.fstat(descriptor)):
                return None
            if _is_dead(descriptor):
                if _is_named(descriptor, entry, folder):
                    with suppress(OSError):
                        os.unlink(entry.removesuffix(_SUFFIX) + _ASKED, dir_fd=folder)
                    os.unlink(entry, dir_fd=folder)
                return None
            for _ in range(_ATTEMPTS):  # while it is being rewritten it may be half new, half old
                if (said := decoded(os.pread(descriptor, _MOST_BYTES, 0))) is not None:
                    return said
                time.sleep(0.001)
            return None
        except OSError:
            return None
        finally:
            os.close(descriptor)

    @contextmanager
    def _opened(self) -> Iterator[int]:
        folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            status = os.fstat(folder)
            if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                raise OSError(f"{self.path} must belong to this user and be writable to nobody else")
            yield folder
        finally:
            os.close(folder)


def _write(descriptor: int, standing: Standing) -> None:
    text = encoded(standing)
    os.pwrite(descriptor, text, 0)
    os.ftruncate(descriptor, len(text))


def _is_ours(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()


def _is_dead(descriptor: int) -> bool:
    """True if nobody holds the lock; then this process does, until it closes the descriptor."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_named(descriptor: int, entry: str, folder: int) -> bool:
    """True if the name still leads to this file."""
    try:
        named = os.stat(entry, dir_fd=folder, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(named, os.fstat(descriptor))
