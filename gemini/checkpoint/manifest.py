"""The manifest of a checkpoint: `gemini.formats.manifest`, whose faults are ``CheckpointError`` here."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gemini.errors import CheckpointError

from ..formats import Damaged, manifest
from ..formats.manifest import FORMAT, MANIFEST_NAME, VERSION

__all__ = ["FORMAT", "MANIFEST_NAME", "VERSION", "FileRecord", "Manifest"]


class FileRecord(manifest.FileRecord):
    """See `gemini.formats.manifest.FileRecord`."""

    __slots__ = ()

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        with _checkpoint_errors():
            return super().of(path)


class Manifest(manifest.Manifest):
    """See `gemini.formats.manifest.Manifest`."""

    __slots__ = ()

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        with _checkpoint_errors():
            return super().read(folder)

    def check(self, folder: Path, *, verify: bool = True, share: tuple[int, int] = (0, 1)) -> None:
        with _checkpoint_errors():
            super().check(folder, verify=verify, share=share)


@contextmanager
def _checkpoint_errors() -> Iterator[None]:
    try:
        yield
    except Damaged as error:
        raise CheckpointError(str(error)) from error
