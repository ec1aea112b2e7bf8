"""What was measured of a disk before, in a file for each file system of each machine."""

import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gemini.safe_files import make_own_folder, open_own, read_file, replace_file

from .disk_file import Requests

VERSION = 2
WAIT_SECONDS = 10.0
"""For another process that measures: several times what a training takes for it."""
_POLL_SECONDS = 0.05
_MOST_BYTES = 1 << 16


class DiskMemory:
    """The file of one file system.

    Parameters
    ----------
    folder
        On that file system; it need not exist yet.
    memory
        Folder of all such files; made where something is to be written.
    """

    def __init__(self, folder: Path, memory: Path) -> None:
        self._folder = _existing(folder)
        self.path = memory / f"{_name(self._folder)}.json"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from measuring at the same time, for `WAIT_SECONDS` at most.

        Where nothing can be written nobody waits: there is nothing to be learnt from another process then.
        """
        try:
            make_own_folder(self.path.parent)
            lock = open_own(self.path.with_suffix(".lock"), os.O_RDWR)
        except OSError:
            yield
            return
        deadline = time.monotonic() + WAIT_SECONDS
        try:
            while not _locked(lock) and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
            yield
        finally:
            os.close(lock)

    def load(self, allowed: Collection[Requests]) -> Requests | None:
        """What was stored, if it is sound and one of these."""
        try:
            content = json.loads(read_file(self.path, _MOST_BYTES))
            requests = Requests(nbytes=content["nbytes"], depth=content["depth"])
            is_sound = content["version"] == VERSION and requests in allowed
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return requests if is_sound else None

    def store(self, requests: Requests) -> Requests:
        """Keep it, with the date, for later processes; where that is not possible it is measured again."""
        content = {
            "version": VERSION,
            "folder": str(self._folder),
            "measured_at": time.time(),
            "nbytes": requests.nbytes,
            "depth": requests.depth,
        }
        with suppress(OSError):
            make_own_folder(self.path.parent)
            replace_file(self.path, json.dumps(content, indent=1).encode() + b"\n")
        return requests


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


def _existing(folder: Path) -> Path:
    """The folder, or the one in which it will be made."""
    resolved = folder.resolve()
    while not resolved.exists():
        resolved = resolved.parent
    return resolved


def _name(folder: Path) -> str:
    """Of its file system on this machine: a home folder may be shared by many machines.

    The device's number may be another disk's after a restart; together with the file system's own number it is not.
    """
    parts = (socket.gethostname(), str(os.stat(folder).st_dev), str(os.statvfs(folder).f_fsid))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
