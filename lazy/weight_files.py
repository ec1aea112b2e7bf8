"""Tensors that lie in a safetensors file and are read when the tape is replayed.

``safetensors.safe_open`` reads in Rust, below every hook that torch has, so inside a context its place is taken by
:class:`LazyFile`, which hands out lazy tensors.

No file is mapped. A map of a file counts in whole against a limit on memory (``ulimit -d``), since its pages may be
written to, and a model's files may be larger than the limit; and the pages that have been read count as ours until it
is closed, so that reading tensor by tensor would end with the whole file in memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import safetensors
import torch
from torch import Tensor

from gemini.errors import LazyInitError

from .record import from_source
from .tape import Tape

_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip

open_file = safetensors.safe_open
"""The original, whatever stands in its place at the moment."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """Tells whether a file is still what it was when it was opened.

    A file that was deleted or replaced is no trouble, because we hold on to the old one; one that was written into is.
    """

    path: Path
    inode: int
    nbytes: int
    changed_ns: int

    @staticmethod
    def of(path: str | os.PathLike[str]) -> Stamp:
        status = os.stat(path)
        return Stamp(Path(path).absolute(), status.st_ino, status.st_size, status.st_mtime_ns)

    def is_of(self, descriptor: int) -> bool:
        """Whether this was taken of the file that is open."""
        status = os.fstat(descriptor)
        return (self.inode, self.nbytes, self.changed_ns) == (status.st_ino, status.st_size, status.st_mtime_ns)

    def check(self) -> None:
        """Raise LazyInitError if the file has been written into."""
        try:
            now = Stamp.of(self.path)
        except FileNotFoundError:
            return
        if now.inode == self.inode and now != self:
            raise LazyInitError(
                f"{self.path} was changed after the lazy model was built from it: expected {self.nbytes} bytes, "
                f"modified at {self.changed_ns} ns, got {now.nbytes} bytes, modified at {now.changed_ns} ns; "
                "build the model again, and keep its files as they are until it is materialised"
            )


@dataclass(frozen=True, slots=True, eq=False)
class FileTensor:
    """Reads one tensor of a safetensors file; what a record calls."""

    reader: Any
    name: str
    stamp: Stamp

    def __call__(self) -> Tensor:
        self.stamp.check()
        tensor: Tensor = self.reader.get_tensor(self.name)
        return tensor


class LazyFile:
    """What ``safetensors.safe_open`` returns inside a context: the same methods, with lazy tensors.

    Parameters
    ----------
    tape : Tape
        Where the tensors are recorded.
    filename : path
        A safetensors file.
    device : str, int or torch.device
        Where the tensors shall live.
    options
        The other arguments of ``safe_open``.
    """

    def __init__(self, tape: Tape, filename: str | os.PathLike[str], device: Any, options: dict[str, Any]) -> None:
        self._tape = tape
        self._device = torch.device(device)
        self._stamp = Stamp.of(filename)
        self._file = open_file(filename, framework="pt", device="cpu", **{**options, "backend": "pread"})
        # Tensors are read when the caller has closed its file.
        self._reader = open_file(filename, framework="pt", backend="pread")

    def __enter__(self) -> LazyFile:
        self._file.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, traceback)

    def keys(self) -> list[str]:
        return list(self._file.keys())

    def offset_keys(self) -> list[str]:
        return list(self._file.offset_keys())

    def metadata(self) -> dict[str, str] | None:
        metadata: dict[str, str] | None = self._file.metadata()
        return metadata

    def get_tensor(self, name: str) -> Tensor:
        return self._lazy(name, self._file.get_slice(name))

    def get_tensors(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        return {name: self.get_tensor(name) for name in (self.keys() if names is None else names)}

    def get_slice(self, name: str) -> LazySlice:
        return LazySlice(self, name, self._file.get_slice(name))

    def _lazy(self, name: str, header: Any) -> Tensor:
        dtype = _DTYPES.get(header.get_dtype())
        if dtype is None:  # packed four-bit types and whatever comes: real at once, as without a context
            return self._file.get_tensor(name).to(self._device)  # type: ignore[no-any-return]
        meta = torch.empty(header.get_shape(), dtype=dtype, device="meta")
        source = FileTensor(self._reader, name, self._stamp)
        return from_source(self._tape, source, meta, torch.device("cpu")).to(self._device)


class LazySlice:
    """What ``get_slice`` returns: indexing it gives a lazy tensor."""

    def __init__(self, file: LazyFile, name: str, header: Any) -> None:
        self._file, self._name, self._header = file, name, header

    def get_shape(self) -> list[int]:
        return list(self._header.get_shape())

    def get_dtype(self) -> str:
        return str(self._header.get_dtype())

    def __getitem__(self, index: Any) -> Tensor:
        whole = self._file._lazy(self._name, self._header)
        return whole if index is Ellipsis else whole[index]
