"""safetensors files, one tensor at a time.

::

    8 bytes            header: JSON, padded with spaces               data
    +----------------+----------------------------------------------+-------------------+-----------+---
    | header length  | {"w": {"dtype", "shape", "data_offsets"}, ...}| w                 | ...       |
    +----------------+----------------------------------------------+-------------------+-----------+---

Everything in the header follows from names, dtypes and shapes, so the file can be written without having the values
together; the library's own ``save_file`` wants all of them in RAM. Reading by ``pread`` needs no map of the file, which
would count as memory of the process (measured: ``safe_open`` and copying peaks at twice the model).
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemini.errors import CheckpointError

from .output import Output
from .raw import DTYPE_NAMES, DTYPES, bytes_of

HEADER_LIMIT_BYTES = 100_000_000
"""As in the library."""
_ALIGN = 8


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
    """Writes a file's tensors in the order of `records`.

    Parameters
    ----------
    tensors
        What will be written. They are sorted by falling size of their elements, so that each is aligned.
    metadata
        The file's own; ``{"format": "pt"}`` is what transformers expects.

    Raises
    ------
    CheckpointError
        If a dtype does not exist in safetensors files.
    """

    def __init__(self, tensors: Iterable[TensorRecord], metadata: Mapping[str, str]) -> None:
        self.records = tuple(sorted(tensors, key=lambda record: -record.dtype.itemsize))
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        end = 0
        for record in self.records:
            if record.dtype not in DTYPE_NAMES:
                raise CheckpointError(
                    f"{record.name} is {record.dtype}, which safetensors files cannot hold; use_safetensors=False can"
                )
            begin, end = end, end + record.nbytes
            header[record.name] = {
                "dtype": DTYPE_NAMES[record.dtype], "shape": list(record.shape), "data_offsets": [begin, end],
            }  # fmt: skip
        text = json.dumps(header, separators=(",", ":")).encode()
        self._header = text + b" " * (-len(text) % _ALIGN)
        self.nbytes = 8 + len(self._header) + end
        """Of the whole file."""

    def begin(self, out: Output) -> None:
        """Write the header."""
        out.write(len(self._header).to_bytes(8, "little") + self._header)

    @staticmethod
    def append(out: Output, record: TensorRecord, value: Tensor) -> None:
        """Write the next tensor."""
        if value.dtype != record.dtype or tuple(value.shape) != record.shape:
            raise CheckpointError(
                f"{record.name} changed while it was saved: from {record.dtype} {record.shape} to {value.dtype} "
                f"{tuple(value.shape)}"
            )
        value = value.contiguous()
        out.write(bytes_of(value))


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
            self._data_start, self._offsets, self.records, self.metadata = self._parse()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        record = self.records[name]
        value = torch.empty(record.shape, dtype=record.dtype, device="cpu")
        if record.nbytes:
            self._fill(bytes_of(value), self._data_start + self._offsets[name], f"tensor {name!r}")
        return value

    # -- the header

    def _parse(self) -> tuple[int, dict[str, int], dict[str, TensorRecord], dict[str, str]]:
        size = os.fstat(self._fd).st_size
        if size < 8:
            raise self._fault(f"it is {size} bytes long")
        length = int.from_bytes(self._bytes(0, 8), "little")
        if length > HEADER_LIMIT_BYTES:
            raise self._fault(f"it says its header has {length} bytes; {HEADER_LIMIT_BYTES} are allowed")
        if 8 + length > size:
            raise self._fault(f"it is cut off: its header ends at byte {8 + length}, the file at {size}")
        header = self._header(self._bytes(8, length))
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._fault("its metadata are not strings")
        offsets: dict[str, int] = {}
        records: dict[str, TensorRecord] = {}
        for name, item in header.items():
            records[name], offsets[name] = self._record(name, item)
        end = 0
        for name in sorted(offsets, key=lambda n: (offsets[n], records[n].nbytes)):
            if offsets[name] != end:
                raise self._fault(f"tensor {name!r} begins at byte {offsets[name]}, the one before it ends at {end}")
            end += records[name].nbytes
        if 8 + length + end != size:
            verb = "is cut off" if size < 8 + length + end else "has bytes too many"
            raise self._fault(f"it {verb}: its header promises {8 + length + end} bytes, it has {size}")
        return 8 + length, offsets, records, metadata

    def _header(self, text: bytes) -> dict[str, Any]:
        try:
            header = json.loads(text, object_pairs_hook=_without_duplicates)
        except (ValueError, RecursionError) as error:
            raise self._fault(f"its header is not readable ({error})") from error
        if not isinstance(header, dict):
            raise self._fault("its header is not a JSON object")
        return header

    def _record(self, name: str, item: Any) -> tuple[TensorRecord, int]:
        try:
            dtype, shape, (begin, end) = DTYPES[item["dtype"]], item["shape"], item["data_offsets"]
        except (TypeError, KeyError, ValueError) as error:
            raise self._fault(f"its header describes tensor {name!r} in a way that makes no sense") from error
        numbers = [begin, end, *shape] if isinstance(shape, list) else [None]
        if any(type(n) is not int or n < 0 for n in numbers):
            raise self._fault(f"its header describes tensor {name!r} in a way that makes no sense")
        record = TensorRecord(name, dtype, tuple(shape))
        if record.nbytes != end - begin:
            raise self._fault(f"tensor {name!r} {record.shape} needs {record.nbytes} bytes and has {end - begin}")
        return record, begin

    def _bytes(self, offset: int, count: int) -> bytes:
        buffer = bytearray(count)
        self._fill(memoryview(buffer), offset, "its header")
        return bytes(buffer)

    def _fill(self, out: memoryview, offset: int, what: str) -> None:
        done = 0
        while done < len(out):
            try:
                count = os.preadv(self._fd, [out[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"{self.path}: reading {what} failed: {error.strerror}") from error
            if count == 0:
                raise CheckpointError(f"{self.path} ends in the middle of {what}; it became shorter while it was read")
            done += count

    def _fault(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is not a whole safetensors file: {what}")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found
