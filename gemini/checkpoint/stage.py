"""Writing files so that a crash, at any moment, leaves either the old checkpoint or the new one.

Everything is written into a hidden folder beside its final place, forced to the disk, and renamed. A rename is atomic,
so a single file, or files that one index names, change from old to new in one instant. The final folder itself is not
swapped: it may be a mount point, or hold files of the user's.

Sharded files over an old checkpoint whose shards have the same names::

    1. write   .x.saving-abc/model-00001-of-00002.safetensors ...      the old index still names the old files
    2. rename  an index that names the files in .x.saving-abc          <- the commit
    3. rename  hard links of the files to their final names
    4. rename  the final index                                         the index is right at every moment
    5. remove  .x.saving-abc, and what only the old index named

Between two of these the folder is synced, because what was not synced may reach the disk in any order. Where there are
no hard links the new files get names that are not taken instead (``model-00001-of-00002-1a2b3c4d.safetensors``).

A process that is killed leaves its hidden folder; the next save to the same place removes it (a lock on the folder
tells that nobody is writing there).
"""

import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from gemini.errors import CheckpointError
from gemini.formats.json_file import LIMIT_BYTES
from gemini.safe_files import read_text

from .folder import is_same_file, locked, make_folder, open_folder, sync_file, sync_folder, try_lock
from .output import Output, failure, make_parent
from .progress import Tell, unseen

_ABANDONED_SECONDS = 24 * 60 * 60
"""Where there are no locks: a hidden folder in which nothing has changed for this time has no writer any more."""


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
        self.path = folder / f"{self._marker}{secrets.token_hex(4)}"
        self._fd = -1
        self._keep = False
        self._created: set[str] = set()

    def __enter__(self) -> "Stage":
        try:
            make_folder(self.folder)
            self._make()
            self._remove_abandoned()
        except OSError as error:
            self._close()
            raise failure(self.folder, error, "cannot be written to") from error
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()
        if isinstance(error, OSError):  # of a library that has written files into the stage
            raise failure(self.folder, error, "cannot be written to") from error

    def create(self, name: str, nbytes: int = 0, tell: Tell = unseen) -> Output:
        """A new file that will be ``folder / name``; ``nbytes`` are reserved at once. See `Output`."""
        self._created.add(name)
        if "/" in name:
            make_parent(self.path / name, self.folder / name)
        return Output(self.path / name, self.folder / name, nbytes, tell)

    def write_text(self, name: str, text: str) -> None:
        with self.create(name) as out:
            out.write(text.encode())

    def alone(self) -> AbstractContextManager[None]:
        """Keep other processes from committing to the folder: files of two saves would be mixed."""
        return locked(self.folder)

    def commit(self, names: Iterable[str], shadowing: Iterable[str] = ()) -> None:
        """Move finished files to their places, one after the other; the last one is the one that counts.

        Parameters
        ----------
        names
            Of finished files. One that is in its place already, with the same bytes, stays.
        shadowing
            Files of the old checkpoint that loaders prefer to the new ones; they are removed at the end.

        Raises
        ------
        CheckpointError
            It says what is in place, and whether that is known to be on the disk.
        """
        *others, last = names
        moved = self._move_all(others, last)
        try:
            self._move(last, last)
        except OSError as error:
            raise self._failure(error, moved, last) from error
        self._finish(last, shadowing)

    def commit_indexed(
        self,
        names: Iterable[str],
        index: str,
        text: Callable[[Mapping[str, str]], str],
        configuration: Iterable[str] = (),
        shadowing: Iterable[str] = (),
    ) -> list[str]:
        """Move files that an index names, and the index; all of them appear at once.

        Parameters
        ----------
        names
            Of finished files.
        index
            Name of the index.
        text
            Makes the index's text from the path, relative to the folder, under which each file is found.
        configuration
            Files that the index does not name; they are moved before the others.
        shadowing
            As for `commit`.

        Returns
        -------
        list of str
            The files that the index names now, relative to the folder.

        Raises
        ------
        CheckpointError
            As `commit`. Once the checkpoint is in place and on the disk, what is left to do may fail without harm.
        """
        names = list(names)
        final = {name: name for name in names}
        if any((self.folder / name).exists() for name in names) and not self._link(names):
            final = self._renamed(names)
            names = list(final.values())
        self.write_text(index, text(final))
        if not any((self.folder / name).exists() for name in names):
            self.commit([*configuration, *names, index], shadowing)
            return names
        moved = self._move_all(configuration, index)
        first = f"first.{index}"
        self.write_text(first, text({name: f"{self.path.name}/{name}" for name in names}))
        self._commit_here(first, index, moved)
        self._finish(index, shadowing)
        try:
            for name in names:
                self._move(f"link.{name}", name)
            self._sync(names)
            self._move(index, index)
            self._sync([index])
        except OSError:  # the checkpoint is whole where it is, named by either index
            return [*names, *(f"{self.path.name}/{name}" for name in names)]
        self._keep = False
        return names

    def discard(self, names: Iterable[str]) -> None:
        """Remove files that loaders do not find any more; one that cannot be removed does no harm."""
        for name in names:
            try:
                (self.folder / name).unlink(missing_ok=True)
            except OSError:
                continue
        self._remove_abandoned()

    # -- the parts of a commit

    def _move_all(self, names: Iterable[str], last: str) -> list[str]:
        """Move what has to be there before ``last``."""
        moved: list[str] = []
        try:
            names = [name for name in names if not is_same_file(self.path / name, self.folder / name)]
            for name in (*names, last):
                if name not in self._created:  # by a library, which does not sync what it writes
                    sync_file(self.path / name)
            for name in names:
                self._move(name, name)
                moved.append(name)
            self._sync(moved)
        except OSError as error:
            raise self._failure(error, moved, last) from error
        return moved

    def _commit_here(self, first: str, index: str, moved: list[str]) -> None:
        """Let the index in the folder name the files where they are."""
        try:
            sync_folder(self.path)
            sync_folder(self.folder)
            self._keep = True  # from the next rename on, the files are needed where they are
            self._move(first, index)
        except OSError as error:
            self._keep = False
            raise self._failure(error, moved, index) from error

    def _finish(self, last: str, shadowing: Iterable[str]) -> None:
        """Force what has been moved to the disk, and remove what loaders prefer to it."""
        old = [name for name in shadowing if (self.folder / name).exists()]
        try:
            self._sync([last])
            for name in old:
                (self.folder / name).unlink()
            self._sync(old)
        except OSError as error:
            raise self._not_forced(error, [name for name in old if (self.folder / name).exists()]) from error

    def _move(self, name: str, final: str) -> None:
        try:
            os.replace(self.path / name, self.folder / final)
        except OSError:
            if (self.path / name).exists() or not (self.folder / final).exists():
                raise  # otherwise it was done, and only the answer was lost, as happens on network file systems

    def _sync(self, names: Iterable[str]) -> None:
        for folder in dict.fromkeys((self.folder / name).parent for name in names):
            sync_folder(folder)

    def _link(self, names: Iterable[str]) -> bool:
        """Make a second name for each file, to be moved; False where there are no hard links."""
        try:
            for name in names:
                os.link(self.path / name, self.path / f"link.{name}")
        except OSError:
            return False
        return True

    def _renamed(self, names: Iterable[str]) -> dict[str, str]:
        """Give the files names that are not taken."""
        free = {name: _with_token(name) for name in names}
        try:
            for name, other in free.items():
                os.rename(self.path / name, self.path / other)
        except OSError as error:
            raise failure(self.folder, error, "cannot be written to") from error
        return free

    def _failure(self, error: OSError, moved: list[str], last: str) -> CheckpointError:
        if not moved:
            return failure(self.folder, error, "cannot be written to")
        return CheckpointError(
            f"{self.folder} cannot be written to: {error.strerror or error}. {last} is as it was, "
            f"{', '.join(moved)} are of the new checkpoint: save again"
        )

    def _not_forced(self, error: OSError, shadowing: list[str]) -> CheckpointError:
        reason = error.strerror or error
        if shadowing:
            return CheckpointError(
                f"{self.folder} holds the files of the new checkpoint, but loaders still find "
                f"{', '.join(shadowing)} of the old one, which could not be removed: {reason}. Save again"
            )
        return CheckpointError(
            f"{self.folder} holds the new checkpoint, which loads, but it could not be forced to the disk: {reason}. "
            "After a power loss the old one may be there again: save again"
        )

    # -- the hidden folder

    def _make(self) -> None:
        """Make and lock the folder; another process that took it for an abandoned one in between has removed it."""
        while True:
            self.path.mkdir()  # not mkdtemp: others may have to read the checkpoint
            self._fd = open_folder(self.path)
            if try_lock(self._fd) is not False and self.path.exists():
                return
            os.close(self._fd)
            self._fd = -1
            self.path = self.folder / f"{self._marker}{secrets.token_hex(4)}"

    def _close(self) -> None:
        try:
            if not self._keep:
                shutil.rmtree(self.path, ignore_errors=True)
        finally:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _remove_abandoned(self) -> None:
        """Remove what killed processes left, unless an index in the folder names it."""
        found = [left for left in self.folder.glob(f"{self._marker}*") if left.is_dir() and left != self.path]
        if not found:
            return
        try:
            sync_folder(self.folder)  # where an index that is not yet on the disk is to replace one that names them
        except OSError:
            return
        for left in found:
            if not _is_named(left, self.folder):
                self._remove(left)

    def _remove(self, left: Path) -> None:
        """Remove a hidden folder that nobody writes into, under its lock."""
        try:
            fd = open_folder(left)
        except OSError:
            return
        try:
            is_free = try_lock(fd)
            if is_free or (is_free is None and _last_change(self.path) - _last_change(left) > _ABANDONED_SECONDS):
                shutil.rmtree(left, ignore_errors=True)
        finally:
            os.close(fd)


def _with_token(name: str) -> str:
    stem, dot, suffix = name.rpartition(".")
    return f"{stem}-{secrets.token_hex(4)}{dot}{suffix}"


def _last_change(folder: Path) -> float:
    """By the clock of the file system, which may be another machine's."""
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    except OSError:
        return float("inf")  # somebody else removes it


def _is_named(left: Path, folder: Path) -> bool:
    try:
        return any(f'"{left.name}/' in read_text(index, LIMIT_BYTES) for index in folder.glob("*.json"))
    except (OSError, UnicodeDecodeError):
        return True  # when in doubt, keep it
