"""safetensors files, one tensor at a time. The layout is drawn in `gemini.formats.safetensors_file.header`.

Everything in the header but the checksums follows from names, dtypes and shapes, so the file can be written without
having the values together; the library's own ``save_file`` wants all of them in RAM. Reading by ``pread`` needs no map
of the file, which would count as memory of the process (measured: ``safe_open`` and copying peaks at twice the model).
"""

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from gemini.errors import CheckpointError
from gemini.formats.safetensors_file import Malformed, Sums, Unsealed, damaged, read_header
from gemini.formats.team import Team
from gemini.process_wide import compute_on_this_thread

from ..formats import listed
from .blocks import BLOCK_BYTES, BlockMemory, Part, parts_to_read, parts_to_write, runs_of
from .flat_values import FlatValues, TensorValues
from .moves import fill, read_run, write_run
from .output import Output
from .progress import Progress, Tell, unseen
from .raw import DTYPE_NAMES, DTYPES, bytes_of, overflow_text


def _nowhere(name: str) -> FlatValues | None:
    return None


ID_KEY = "gemini_memory.id"
VERSIONS_KEY = "gemini_memory.versions"
"""What ``state_dict()`` says of modules (``_metadata``), which their overrides look at; JSON."""
"""In the metadata: which state of training the tensors are from, see `StateId`."""


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor in a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    kept: torch.dtype | None = None
    """Of the values that are to be written, where they are rounded to ``dtype``."""

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

    def write(
        self,
        out: Output,
        read: Callable[[str], Tensor],
        open: Callable[[str], FlatValues | None] = _nowhere,
    ) -> None:
        """Write everything.

        Parameters
        ----------
        read
            Gives the value of a name, on CPU; asked on this thread, in the order of `records`.
        open
            Asked before, for the values where they are; None if there is no such place.
        """
        sums = Sums(len(self.records))
        try:
            with Team(BlockMemory, out.progress, _compute_alone) as team:
                for run in runs_of(self._parts(read, open, team)):
                    team.do(partial(write_run, out, run, sums))
        except OverflowError as error:
            raise CheckpointError(overflow_text(self.records[error.args[0]].name)) from error
        out.write_at(0, memoryview(bytearray(self._header.sealed(sums.all()))))

    def _parts(
        self, read: Callable[[str], Tensor], open: Callable[[str], FlatValues | None], team: Team[BlockMemory]
    ) -> Iterator[Part | None]:
        for index, (record, begin) in enumerate(zip(self.records, self._header.begins, strict=True)):
            values = open(record.name)
            if values is None:
                if record.nbytes > BLOCK_BYTES:  # not two of them at a time
                    yield None
                    team.settle()
                values = self._whole(record, read(record.name))
            yield from parts_to_write(index, values, record.dtype, begin)

    @staticmethod
    def _whole(record: TensorRecord, value: Tensor) -> FlatValues:
        if value.dtype != (record.kept or record.dtype) or tuple(value.shape) != record.shape:
            raise CheckpointError(
                f"{record.name} changed while it was saved: from {record.kept or record.dtype} {record.shape} to "
                f"{value.dtype} {tuple(value.shape)}"
            )
        return TensorValues(value.contiguous())


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
                self._opened = self._version()
        except BaseException:
            self.close()
            raise
        self.records = {name: TensorRecord(name, DTYPES[t.dtype], t.shape) for name, t in self._header.tensors.items()}
        self.metadata = self._header.metadata
        self._index = {name: index for index, name in enumerate(self.records)}
        self._is_verified = False

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def checked_nbytes(self) -> int:
        """Bytes of tensors that have a checksum."""
        return sum(r.nbytes for r in self.records.values()) if self._header.checksums is not None else 0

    def verify(self, tell: Tell = unseen) -> None:
        """Compare all tensors with their checksums; without any, do nothing.

        Parameters
        ----------
        tell
            Told how many bytes have been read so far.

        Raises
        ------
        CheckpointError
            If one disagrees.
        """
        with self._faults("its tensors"):
            found = damaged(self._fd, self._header, tell)
        if found:
            raise CheckpointError(
                f"{self.path} is damaged: {listed(found)} have other bytes than were saved. Load another "
                "checkpoint; verify=False reads this one as it is"
            )
        self._is_verified = True

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own.

        Raises
        ------
        CheckpointError
            If the file is not the one that was opened and verified any more.
        """
        record = self.records[name]
        value = torch.empty(record.shape, dtype=record.dtype, device="cpu")
        with self._faults(f"tensor {name!r}"):
            fill(self._fd, bytes_of(value), self._header.tensors[name].begin)
            self._check_unchanged({self._index[name]: zlib.crc32(bytes_of(value))})
        return value

    def read_part(self, name: str, part: range) -> Tensor:
        """Elements of one tensor, in its order (flat), in memory of their own.

        Raises
        ------
        CheckpointError
            If the file has been changed since it was opened.
        """
        record = self.records[name]
        value = torch.empty(len(part), dtype=record.dtype, device="cpu")
        with self._faults(f"tensor {name!r}"):
            fill(self._fd, bytes_of(value), self._header.tensors[name].begin + part.start * record.dtype.itemsize)
            self._check_unchanged({})
        return value

    def load(self, targets: Mapping[str, FlatValues], tell: Tell = unseen) -> None:
        """Replace values by those of the tensors with these names.

        Parameters
        ----------
        tell
            Told how many bytes have been read so far.

        Raises
        ------
        CheckpointError
            As `read`; any values may have been replaced then.
        """
        sums = Sums(len(self.records))
        with self._faults("its tensors"):
            with Team(BlockMemory, tell, _compute_alone) as team:
                for run in runs_of(self._parts(targets)):
                    team.do(partial(read_run, self._fd, run, sums))
            found = sums.all()
            self._check_unchanged({self._index[name]: found[self._index[name]] for name in targets})

    def _parts(self, targets: Mapping[str, FlatValues]) -> Iterator[Part]:
        tensors = self._header.tensors
        for name in sorted(targets, key=lambda name: tensors[name].begin):
            yield from parts_to_read(self._index[name], targets[name], self.records[name].dtype, tensors[name].begin)

    def _check_unchanged(self, found: Mapping[int, int]) -> None:
        """Raise if the file is not as it was verified; ``found`` are the CRC-32s of tensors that were read."""
        due = self._header.checksums if self._is_verified else None
        if self._version() != self._opened or (due is not None and any(crc != due[i] for i, crc in found.items())):
            raise CheckpointError(f"{self.path} was changed by another program while it was loaded")

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


T = TypeVar("T")

_ATTEMPTS = 10
"""Saves that may replace a checkpoint while it is being opened, one after the other."""


class OpenFiles:
    """The files of a checkpoint while they are loaded: safetensors ones stay open. A context manager."""

    def __init__(self) -> None:
        self._files: list[SafetensorsFile] = []
        self._others: list[Callable[[], None]] = []
        self._ids: dict[str, Path] = {}
        self.versions: dict[str, Any] = {}
        """What a state dict in the files says of its modules."""

    def __enter__(self) -> "OpenFiles":
        return self

    def __exit__(self, *error: object) -> None:
        self._forget()

    def _forget(self) -> None:
        for file in self._files:
            file.close()
        self._files.clear()
        self._others.clear()
        self._ids.clear()
        self.versions.clear()

    def open(self, path: Path) -> SafetensorsFile:
        """Open one more; see `SafetensorsFile`."""
        file = SafetensorsFile(path)
        self._files.append(file)
        self.says(path, file.metadata.get(ID_KEY))
        if (text := file.metadata.get(VERSIONS_KEY)) is not None:
            try:
                self.describes(json.loads(text))
            except ValueError as error:
                raise CheckpointError(f"{path}: {VERSIONS_KEY} in its header is no JSON: {error}") from error
        return file

    def settled(self, checkpoint: Path, read: Callable[[], T]) -> T:
        """What `read` opens here; once more where a save has replaced files of the checkpoint meanwhile."""
        folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
        for _ in range(_ATTEMPTS):
            before = _files_in(folder)
            try:
                found = read()
            except CheckpointError:
                if _files_in(folder) == before:
                    raise
            else:
                if _files_in(folder) == before:
                    return found
            self._forget()
        return read()

    def verify_later(self, verify: Callable[[], None]) -> None:
        """Have `verify` call this for a file of another format."""
        self._others.append(verify)

    def says(self, path: Path, id: object) -> None:
        """A file, of any format, has the id of the state that it was saved in, or something else for one."""
        if isinstance(id, str):
            self._ids.setdefault(id, path)

    def describes(self, metadata: object) -> None:
        """A file has what a state dict says of its modules, or something else for it."""
        if isinstance(metadata, dict):
            self.versions.update({name: each for name, each in metadata.items() if isinstance(each, dict)})

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
        with Progress("verifying", sum(file.checked_nbytes for file in self._files)) as progress:
            for file in self._files:
                file.verify(progress.part(file.checked_nbytes))
        for verify in self._others:
            verify()


def _files_in(folder: Path) -> Set[tuple[str, int, int]]:
    """What the files of a folder are known by; another one with the same name is another entry."""
    found = set()
    try:
        with os.scandir(folder) as names:
            for entry in names:
                if not entry.name.startswith(".") and not entry.is_dir():
                    status = entry.stat()
                    found.add((entry.name, status.st_ino, status.st_mtime_ns))
    except OSError:
        pass  # somebody else removes it
    return found


def _compute_alone() -> None:
    compute_on_this_thread(torch.get_num_threads, torch.set_num_threads)
