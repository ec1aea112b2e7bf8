"""A stage into which several ranks write: the first one makes it, commits and removes it.

::

    first     makes the hidden folder    writes its files    commits, if all have written    removes what is left
    others    look whether they see it   write their files   wait
"""

import os
import secrets
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from gemini.errors import CheckpointError

from .folder import sync_folder
from .output import Output, failure, make_parent
from .progress import Tell, unseen
from .ranks import Crew
from .stage import Stage

SEEN = ".seen"
_PATIENCE_SECONDS = 20.0
"""A network file system may take as long to show what another machine has made."""
_LOOK_SECONDS = 0.1


class SharedStage:
    """A `Stage` of all ranks. A context manager; all ranks enter it together.

    Parameters
    ----------
    crew
        The ranks.
    folder, name
        As of `Stage`.
    doing
        What this is, in words.

    Raises
    ------
    CheckpointError
        If it cannot be made, or this rank sees another file system than the first one.
    RankError
        If that is so on another rank.
    """

    def __init__(self, crew: Crew, folder: Path, name: str, doing: str) -> None:
        self._crew = crew
        self._folder = folder
        self._name = name
        self._doing = doing
        self._files = ExitStack()
        self._stages: list[Stage] = []
        self.path = folder
        """The hidden folder, once it has been entered."""

    def __enter__(self) -> "SharedStage":
        with ExitStack() as files:
            made, token = self._crew.exchange(f"the folder of {self._doing}", lambda: self._make(files))[0]
            self.path = Path(made)
            self._crew.exchange(f"a look at the folder of {self._doing}", lambda: self._see(token))
            self._files = files.pop_all()
        if self._crew.is_first:
            (self.path / SEEN).unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._files.close()

    @property
    def stage(self) -> Stage:
        """The stage, on the first rank."""
        return self._stages[0]

    def create(self, name: str, nbytes: int = 0, tell: Tell = unseen) -> Output:
        """A new file that will be ``folder / name``; ``nbytes`` are reserved at once."""
        return Output(self.path / name, self._folder / name, nbytes, tell)

    def write_text(self, name: str, text: str) -> None:
        with self.create(name) as out:
            out.write(text.encode())

    def become(self, final: Path) -> None:
        """Give the folder its final name, where nothing or an empty folder is.

        Raises
        ------
        CheckpointError
            If the system refuses.
        """
        try:
            sync_folder(self.path)
            os.rename(self.path, final)
        except OSError as error:
            raise failure(final, error, "cannot be made") from error
        try:
            sync_folder(final.parent)
        except OSError as error:
            raise CheckpointError(
                f"{final} is whole, but the disk did not confirm it ({error.strerror or error}): it may be gone after "
                "a power failure"
            ) from error

    def _see(self, token: str) -> None:
        if not self._crew.is_first:
            StageOfFirst(self.path, self._folder, token)

    def _make(self, files: ExitStack) -> list[str]:
        if not self._crew.is_first:
            return []
        stage, token = files.enter_context(Stage(self._folder, self._name)), secrets.token_hex(8)
        self._stages.append(stage)
        stage.write_text(SEEN, token)
        return [str(stage.path), token]


class StageOfFirst:
    """A stage that the first rank has made, from another one.

    Parameters
    ----------
    path
        The hidden folder.
    folder
        Where its files will be.
    token
        What is to be found in it, if it is the same folder here.

    Raises
    ------
    CheckpointError
        If this rank sees another file system.
    """

    def __init__(self, path: Path, folder: Path, token: str) -> None:
        self.path = path
        self.folder = folder
        self._look(token)

    def create(self, name: str, nbytes: int = 0, tell: Tell = unseen) -> Output:
        """A new file; ``nbytes`` are reserved at once."""
        if "/" in name:
            make_parent(self.path / name, self.folder / name)
        return Output(self.path / name, self.folder / name, nbytes, tell)

    def _look(self, token: str) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                os.listdir(self.folder)  # has a network file system look again
                if (self.path / SEEN).read_text() == token:
                    return
            except OSError:
                pass
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{self.folder} is not the folder that the first rank writes to: what it has made there, "
                    f"{self.path.name}, is not to be seen here. Ranks that save together write to one file system: "
                    "give a folder on one that all machines share (NFS, Lustre)"
                )
            time.sleep(_LOOK_SECONDS)  # a network file system tells nobody of a new file
