"""safetensors files, one tensor at a time. The layout is drawn in `gemini.tensor_file.header`.

Everything in the header but the checksums follows from names, dtypes and shapes, so the file can be written without
having the values together; the library's own ``save_file`` wants all of them in RAM. Reading by ``pread`` needs no map
of the file, which would count as memory of the process (measured: ``safe_open`` and copying peaks at twice the model).
"""

import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from gemini.errors import CheckpointError
from gemini.tensor_file import Malformed, Unsealed, damaged, read_header

from ..formats import listed
from .output import Output
from .raw import DTYPE_NAMES, DTYPES, bytes_of

ID_KEY = "gemini_memory.id"
"""In the metadata: which state of training the tensors are from, see `StateId`."""


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor in a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """Writes a file's tensors in the order of `records`, and their checksums.

    Parameters
    ----------
    tensors
        What will be written. They are sorted by falling size of their elements, so that each is aligned.
    metadata
        The file's own; ``{"format": "pt"}`` is what transformers expects.

    Raises
    ------
    CheckpointError
        If a dtype does not exist in safetensors files, or one file cannot hold that many tensors.
    """

    def __init__(self, tensors: Iterable[TensorRecord], metadata: Mapping[str, str]) -> None:
        self.records = tuple(sorted(tensors, key=lambda record: -record.dtype.itemsize))
        for record in self.records:
            if record.dtype not in DTYPE_NAMES:
                raise CheckpointError(
                    f"{record.name} is {record.dtype}, which safetensors files cannot hold; use_safetensors=False can"
                )
        try:
            self._header = Unsealed(((r.name, DTYPE_NAMES[r.dtype], r.shape) for r in self.records), metadata)
        except ValueError as error:
            raise CheckpointError(f"{error}: save with shard=True, into several files") from error
        self.nbytes = self._header.file_nbytes
        """Of the whole file."""

    def write(self, out: Output, read: Callable[[str], Tensor]) -> None:
        """Write everything.

        Parameters
        ----------
        read
            Gives the value of a name; asked once for each, in the order of `records`.
        """
        checksums = []
        for record, begin in zip(self.records, self._header.begins, strict=True):
            checksums.append(self._append(out, record, begin, read))
        out.write_at(0, self._header.sealed(checksums))

    @staticmethod
    def _append(out: Output, record: TensorRecord, begin: int, read: Callable[[str], Tensor]) -> int:
        value = read(record.name)
        if value.dtype != record.dtype or tuple(value.shape) != record.shape:
            raise CheckpointError(
                f"{record.name} changed while it was saved: from {record.dtype} {record.shape} to {value.dtype} "
                f"{tuple(value.shape)}"
            )
        value = value.contiguous()
        data = bytes_of(value)
        out.write_at(begin, data)
        return zlib.crc32(data)


class SafetensorsFile:
    """A file opened for reading; its header is checked at once. A context manager.

    Raises
    ------
    CheckpointError
        If it is not a safetensors file, or not a whole one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        try:
            with self._faults("its header"):
                self._header = read_header(self._fd)
                self._verified = self._version()
        except BaseException:
            self.close()
            raise
        self.records = {name: TensorRecord(name, DTYPES[t.dtype], t.shape) for name, t in self._header.tensors.items()}
        self.metadata = self._header.metadata

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def verify(self) -> None:
        """Compare all tensors with their checksums; without any, do nothing.

        Raises
        ------
        CheckpointError
            If one disagrees.
        """
        with self._faults("its tensors"):
            self._verified = self._version()
            found = damaged(self._fd, self._header)
        if found:
            raise CheckpointError(
                f"{self.path} is damaged: {listed(found)} have other bytes than were saved. Load another "
                "checkpoint; verify=False reads this one as it is"
            )

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own.

        Raises
        ------
        CheckpointError
            If the file is not the one that was opened and verified any more.
        """
        record, place = self.records[name], self._header.tensors[name]
        value = torch.empty(record.shape, dtype=record.dtype, device="cpu")
        with self._faults(f"tensor {name!r}"):
            out, done = bytes_of(value), 0
            while done < len(out):
                count = os.preadv(self._fd, [out[done:]], place.begin + done)
                if not count:
                    raise Malformed(f"it became shorter while tensor {name!r} was read")
                done += count
            if self._version() != self._verified:
                raise CheckpointError(f"{self.path} was changed by another program while it was loaded")
        return value

    def _version(self) -> tuple[int, int]:
        status = os.fstat(self._fd)
        return status.st_size, status.st_mtime_ns

    @contextmanager
    def _faults(self, what: str) -> Iterator[None]:
        try:
            yield
        except Malformed as error:
            raise CheckpointError(f"{self.path} is not a whole safetensors file: {error}") from error
        except OSError as error:
            raise CheckpointError(f"{self.path}: reading {what} failed: {error.strerror}") from error


class OpenFiles:
    """The files of a checkpoint while they are loaded: safetensors ones stay open. A context manager."""

    def __init__(self) -> None:
        self._files: list[SafetensorsFile] = []
        self._others: list[Callable[[], None]] = []
        self._ids: dict[str, Path] = {}

    def __enter__(self) -> "OpenFiles":
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files:
            file.close()

    def open(self, path: Path) -> SafetensorsFile:
        """Open one more; see `SafetensorsFile`."""
        file = SafetensorsFile(path)
        self._files.append(file)
        self.says(path, file.metadata.get(ID_KEY))
        return file

    def verify_later(self, verify: Callable[[], None]) -> None:
        """Have `verify` call this for a file of another format."""
        self._others.append(verify)

    def says(self, path: Path, id: object) -> None:
        """A file, of any format, has the id of the state that it was saved in, or something else for one."""
        if isinstance(id, str):
            self._ids.setdefault(id, path)

    @property
    def id(self) -> str | None:
        """The id that the files have in common; None if they have none.

        Raises
        ------
        CheckpointError
            If they have different ones.
        """
        if len(self._ids) > 1:
            first, second, *_ = self._ids.values()
            raise CheckpointError(
                f"{first} and {second} are not of the same save: one of them has been replaced. Load another checkpoint"
            )
        return next(iter(self._ids), None)

    def verify(self) -> None:
        """Compare all tensors of all files with their checksums; see `SafetensorsFile.verify`."""
        for file in self._files:
            file.verify()
        for verify in self._others:
            verify()
