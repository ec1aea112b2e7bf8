"""Files that ``torch.load`` reads, written one tensor at a time; ``torch.save`` wants all of them in RAM.

A file of ``torch.save`` is a zip archive without compression: a pickle of the value, in which tensors are references to
storages by number, and a record for each storage::

    archive/data.pkl    {"weight": _rebuild_tensor_v2(storage 0, offset, shape, strides, ...)}
    archive/byteorder   little
    archive/data/0      the bytes of storage 0, at a multiple of 64
    archive/version     3

Shapes and dtypes are enough for the pickle, so values are read when their record is written. Each record has its
CRC-32, as every zip archive.
"""

import io
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from gemini.errors import CheckpointError

from ..torch_private import rebuild_tensor, rebuild_tensor_of_dtype
from .contents import UnreadTensor
from .output import Output
from .raw import bytes_of
from .stage import Stage
from .torch_file import write_torch
from .unread import as_stored, read_all

_PROTOCOL = 2
"""Of pickles that ``weights_only`` reads."""
_ROOT = "archive"
_ALIGN = 64
_ZIP64_BYTES = 1 << 31
_TYPES: dict[torch.dtype, Any] = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.complex64: torch.ComplexFloatStorage,
    torch.complex128: torch.ComplexDoubleStorage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}
"""By these names a pickle refers to storages; those of other dtypes are bytes (`torch.UntypedStorage`)."""


def save_streamed(value: Any, path: Path, *, stage: str | None = None) -> None:
    """`write_streamed` into a file that is there whole or not at all, whatever happens; an older one stays until then.

    Parameters
    ----------
    stage
        Saves to one folder with the same name here remove what those that were killed have left; None: those to the
        same file.

    Raises
    ------
    CheckpointError
        If it cannot be written.
    """
    path = path.absolute()
    with Stage(path.parent, stage or path.name) as files:
        with files.create(path.name) as out:
            write_streamed(value, out)
        files.commit([path.name])


def write_streamed(value: Any, out: Output) -> None:
    """Write what ``torch.load`` reads as ``value``, with the values of all `UnreadTensor` in it.

    Beside what is in memory already this takes the memory of the largest tensor. A value with tensors that are not
    plain ones on the CPU (sparse, on a device, subclasses) goes through ``torch.save``.
    """
    pickled = io.BytesIO()
    pickler = _Pickler(pickled, _PROTOCOL)
    try:
        pickler.dump(as_stored(value))
    except _NotPlain:
        write_torch(read_all(value), out)
        return
    try:
        with zipfile.ZipFile(cast("IO[bytes]", _Sink(out)), "w", zipfile.ZIP_STORED) as archive:
            _add(archive, out, "data.pkl", pickled.getbuffer())
            _add(archive, out, "byteorder", memoryview(sys.byteorder.encode()))
            for key, (nbytes, read) in enumerate(pickler.storages):
                _add_storage(archive, out, f"data/{key}", nbytes, read)
            _add(archive, out, "version", memoryview(b"3\n"))
    except BaseException:
        if out.fault is not None:
            raise out.fault from None
        raise


def verify_streamed(path: Path) -> None:
    """Compare all records of a file of ``torch.save`` with their checksums.

    Raises
    ------
    CheckpointError
        If one disagrees, or the file is not whole.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise CheckpointError(f"{path} is not a whole file of torch.save: {error}") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: {damaged} does not have the checksum that it was written with")


class _Sink:
    """What an archive may do with an `Output`: append."""

    def __init__(self, out: Output) -> None:
        self.write = out.write
        self.flush = out.flush


class _NotPlain(Exception):
    """A tensor that is more than bytes, a dtype and strides."""


@dataclass(frozen=True, slots=True)
class _Storage:
    key: int
    dtype: torch.dtype
    numel: int


class _Pickler(pickle.Pickler):
    """Puts references in the place of tensors, as ``torch.save`` does.

    Attributes
    ----------
    storages : list of (int, Callable)
        The bytes of each storage, and how to get a tensor over just them.
    """

    def __init__(self, file: IO[bytes], protocol: int) -> None:
        super().__init__(file, protocol)
        self.storages: list[tuple[int, Callable[[], Tensor]]] = []
        self._known: dict[int, _Storage] = {}

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, UnreadTensor):
            shape, dtype = value.record.shape, value.record.dtype
            storage = self._add(id(value), dtype, prod(shape), lambda: value.read().contiguous())
            return _reference(storage, dtype, 0, shape, _strides(shape), False)
        if isinstance(value, Tensor):
            if type(value) is not Tensor or value.layout != torch.strided or value.device.type != "cpu":
                raise _NotPlain
            if value.is_conj() or value.is_neg() or value.is_quantized or value.__dict__:
                raise _NotPlain
            held = value.untyped_storage()
            dtype, numel = value.dtype, held.nbytes() // value.element_size()
            whole = torch.empty(0, dtype=dtype, device="cpu").set_(held, 0, (numel,), (1,))
            storage = self._add(held.data_ptr() or id(value), dtype, numel, lambda: whole)
            if storage.dtype != dtype:
                raise _NotPlain
            size, stride, offset = tuple(value.shape), value.stride(), int(value.storage_offset())
            return _reference(storage, dtype, offset, size, stride, value.requires_grad)
        return NotImplemented

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        kind = _TYPES.get(value.dtype)
        numel = value.numel if kind is not None else value.numel * value.dtype.itemsize
        return ("storage", kind or torch.UntypedStorage, str(value.key), "cpu", numel)

    def _add(self, identity: int, dtype: torch.dtype, numel: int, read: Callable[[], Tensor]) -> _Storage:
        if identity not in self._known:
            self._known[identity] = _Storage(len(self.storages), dtype, numel)
            self.storages.append((numel * dtype.itemsize, read))
        return self._known[identity]


def _reference(
    storage: _Storage,
    dtype: torch.dtype,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
) -> Any:
    arguments: tuple[Any, ...] = (storage, offset, size, stride, requires_grad, OrderedDict())
    if dtype in _TYPES:
        return rebuild_tensor, arguments
    return rebuild_tensor_of_dtype, (*arguments, dtype)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def _add_storage(archive: zipfile.ZipFile, out: Output, name: str, nbytes: int, read: Callable[[], Tensor]) -> None:
    value = read()
    data = bytes_of(value)
    if len(data) != nbytes:
        raise CheckpointError(f"{out.final}: a tensor changed its size while it was saved")
    _add(archive, out, name, data)


def _add(archive: zipfile.ZipFile, out: Output, name: str, data: memoryview) -> None:
    info = zipfile.ZipInfo(f"{_ROOT}/{name}")
    is_large = len(data) >= _ZIP64_BYTES
    start = out.written + 30 + len(info.filename) + 4 + (20 if is_large else 0)
    padding = -start % _ALIGN
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"\0" * padding  # as torch pads
    info.file_size = len(data)
    with archive.open(info, "w", force_zip64=is_large) as record:
        record.write(data)
