"""Writing files so that a crash, at any moment, leaves either the old checkpoint or the new one.

Everything is written into a hidden folder beside its final place, forced to the disk, and renamed. A rename is atomic,
so a single file, or files that one index names, change from old to new in one instant. The final folder itself is not
swapped: it may be a mount point, or hold files of the user's.

Sharded files over an old checkpoint whose shards have the same names::

    1. write   .x.saving-abc/model-00001-of-00002.safetensors ...      the old index still names the old files
    2. rename  an index that names the files in .x.saving-abc          <- the commit
    3. link the files to their final names, rename the final index     the index is right at every moment
    4. remove  .x.saving-abc, and what only the old index named

A process that is killed leaves its hidden folder; the next save to the same place removes it (a lock on the folder
tells that nobody is writing there).
"""

import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType

from .output import Output, failure


class Stage:
    """A hidden folder beside ``name`` in ``folder``, for the files of one save. A context manager; removed at its end.

    Parameters
    ----------
    folder
        Where the files will be; made if it does not exist.
    name
        Of the thing saved; saves of different things to one folder do not meet.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self._marker = f".{name}.saving-"
        self._keep = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._remove_abandoned()
            self.path = folder / f"{self._marker}{secrets.token_hex(4)}"
            self.path.mkdir()  # not mkdtemp: others may have to read the checkpoint
            self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            _lock(self._fd)
        except OSError as error:
            raise failure(folder, error, "cannot be written to") from error

    def __enter__(self) -> "Stage":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._fd)
        if not self._keep:
            shutil.rmtree(self.path, ignore_errors=True)

    def create(self, name: str, nbytes: int = 0) -> Output:
        """A new file that will be ``folder / name``; ``nbytes`` are reserved at once."""
        return Output(self.path / name, self.folder / name, nbytes)

    def write_text(self, name: str, text: str) -> None:
        with self.create(name) as out:
            out.write(text.encode())

    def commit(self, names: Iterable[str]) -> None:
        """Move finished files to their places, one after the other; the last one is the one that counts."""
        try:
            for name in names:
                os.replace(self.path / name, self.folder / name)
                sync_folder(self.folder)
        except OSError as error:
            raise failure(self.folder, error, "cannot be written to") from error

    def commit_indexed(self, names: Iterable[str], index: str, text: Callable[[Mapping[str, str]], str]) -> None:
        """Move files that an index names, and the index; all of them appear at once.

        Parameters
        ----------
        names
            Of finished files.
        index
            Name of the index.
        text
            Makes the index's text from the path, relative to the folder, under which each file is found.
        """
        names = list(names)
        where = {name: name for name in names}
        self.write_text(index, text(where))
        if not any((self.folder / name).exists() for name in names):
            self.commit([*names, index])
            return
        first = f"first.{index}"
        self.write_text(first, text({name: f"{self.path.name}/{name}" for name in names}))
        self._keep = True  # from the next rename on, the files are needed where they are
        try:
            os.replace(self.path / first, self.folder / index)
            sync_folder(self.folder)
        except OSError as error:
            self._keep = False
            raise failure(self.folder, error, "cannot be written to") from error
        try:
            for name in names:
                os.link(self.path / name, self.path / f"link.{name}")
                os.replace(self.path / f"link.{name}", self.folder / name)
        except OSError:
            return  # a file system without hard links: the checkpoint stays where it is, named by its index
        self.commit([index])
        self._keep = False

    def _remove_abandoned(self) -> None:
        """Remove what killed processes left, unless an index in the folder names it."""
        for left in self.folder.glob(f"{self._marker}*"):
            if left.is_dir() and not _is_named(left, self.folder) and not _is_locked(left):
                shutil.rmtree(left, ignore_errors=True)


def remove(paths: Iterable[Path]) -> None:
    """Remove files that a finished save has replaced; one that cannot be removed does no harm."""
    for path in paths:
        try:
            path.unlink()
        except OSError:
            continue
        if ".saving-" in path.parent.name:
            shutil.rmtree(path.parent, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Force renames in a folder to the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _is_named(left: Path, folder: Path) -> bool:
    try:
        return any(f'"{left.name}/' in index.read_text() for index in folder.glob("*.json"))
    except (OSError, UnicodeDecodeError):
        return True  # when in doubt, keep it


def _lock(fd: int) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        pass  # a file system without locks


def _is_locked(folder: Path) -> bool:
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False
