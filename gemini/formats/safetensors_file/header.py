"""The header of a safetensors file: read within limits, written before the values are known.

::

    8 bytes            header: JSON, padded with spaces               data
    +----------------+----------------------------------------------+-------------------+-----------+---
    | header length  | {"w": {"dtype", "shape", "data_offsets"}, ...}| w                 | ...       |
    +----------------+----------------------------------------------+-------------------+-----------+---

Its metadata have checksums, which other readers ignore::

    "gemini_memory.crc32"     CRC-32 of each tensor, 8 hexadecimal digits each, in the order of the header and the data
    "gemini_memory.header"    CRC-32 of the header itself, with 00000000 in the place of these digits

All digits have a fixed number, so the header's length is known in advance: the data are written first, the header last.
"""

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

HEADER_LIMIT_BYTES = 100_000_000
"""As in the library."""
TENSORS_LIMIT = 1 << 18
"""In one file. The models with most tensors have some 90,000, in over 100 files."""
_NUMBERS_LIMIT = 8 * TENSORS_LIMIT
"""Commas in a header."""
CHECKSUMS = "gemini_memory.crc32"
SEAL = "gemini_memory.header"
_NO_CHECKSUM = "00000000"
_PAGE_BYTES = 4096

DTYPE_NBYTES: Mapping[str, int] = {
    **dict.fromkeys(("F64", "C64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 1),
}
"""Of one element."""


class Malformed(ValueError):
    """A file is not a whole safetensors file; the message says why and does not name it."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a file has a tensor."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    """First byte in the file."""
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself."""

    tensors: Mapping[str, StoredTensor]
    """In the order of the header."""
    metadata: Mapping[str, str]
    checksums: tuple[int, ...] | None
    """Of the tensors in their order; None: the file has none."""


class Unsealed:
    """The beginning of a file whose values are not known.

    Parameters
    ----------
    tensors
        Name, dtype and shape, in the order of the data.
    metadata
        The file's own.

    Raises
    ------
    ValueError
        If there are more tensors than a reader accepts.
    """

    def __init__(self, tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> None:
        tensors = list(tensors)
        if len(tensors) > TENSORS_LIMIT:
            raise ValueError(f"{len(tensors)} tensors are too many for one file, which has at most {TENSORS_LIMIT}")
        offsets = [0]
        header: dict[str, Any] = {"__metadata__": {}}
        for name, dtype, shape in tensors:
            offsets.append(offsets[-1] + prod(shape) * DTYPE_NBYTES[dtype])
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets[-2:]}
        checksums = {CHECKSUMS: _NO_CHECKSUM * len(tensors), SEAL: _NO_CHECKSUM}
        header["__metadata__"] = {**checksums, **metadata}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _PAGE_BYTES)  # the data begin with a page
        if len(text) > HEADER_LIMIT_BYTES:
            raise ValueError(f"a header of {len(text)} bytes is too long; one file has at most {HEADER_LIMIT_BYTES}")
        self._text = len(text).to_bytes(8, "little") + text
        self._count = len(tensors)
        self.begins = tuple(len(self._text) + offset for offset in offsets[:-1])
        """Where each tensor begins in the file."""
        self.file_nbytes = len(self._text) + offsets[-1]

    def sealed(self, checksums: Iterable[int]) -> bytes:
        """The header and what is before it, once there are the CRC-32s of all tensors."""
        digits = "".join(f"{crc:08x}" for crc in checksums)
        assert len(digits) == len(_NO_CHECKSUM) * self._count
        text = _replaced(self._text, CHECKSUMS, digits)
        return _replaced(text, SEAL, f"{zlib.crc32(text[8:]):08x}")


def read_header(fd: int) -> Header:
    """The header of an open file, checked against its size.

    Its parts are counted before they are parsed: no file takes more than some seconds and 300 MB.

    Raises
    ------
    Malformed
        If it is no safetensors file, or not a whole one.
    OSError
        As the system says.
    """
    size = os.fstat(fd).st_size
    if size < 8:
        raise Malformed(f"it is {size} bytes long")
    length = int.from_bytes(_read(fd, 0, 8), "little")
    if length > HEADER_LIMIT_BYTES:
        raise Malformed(f"it says its header has {length} bytes; {HEADER_LIMIT_BYTES} are allowed")
    if 8 + length > size:
        raise Malformed(f"it is cut off: its header ends at byte {8 + length}, the file at {size}")
    text = _read(fd, 8, length)
    items = _parsed(text)
    metadata = items.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Malformed("its metadata are not strings")
    tensors = {name: _tensor(name, item, 8 + length) for name, item in items.items()}
    _check_places(tensors, 8 + length, size)
    return Header(tensors, metadata, _checksums(metadata, len(tensors), text))


def _read(fd: int, offset: int, count: int) -> bytes:
    parts: list[bytes] = []
    while count:
        part = os.pread(fd, count, offset)
        if not part:
            raise Malformed("it became shorter while its header was read")
        parts.append(part)
        offset += len(part)
        count -= len(part)
    return b"".join(parts)


def _parsed(text: bytes) -> dict[str, Any]:
    # Counted before they are parsed: each tensor needs a brace, and nothing can stand for one.
    if (count := text.count(b"{") - 2) > TENSORS_LIMIT:
        raise Malformed(f"its header has {count} tensors; {TENSORS_LIMIT} are allowed")
    if (count := text.count(b",")) > _NUMBERS_LIMIT:
        raise Malformed(f"its header has {count} commas; {_NUMBERS_LIMIT} are allowed")
    try:
        items = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"its header is not readable ({str(error)[:200]})") from error
    if not isinstance(items, dict):
        raise Malformed("its header is not a JSON object")
    return items


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _tensor(name: str, item: Any, data_start: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = item["dtype"], item["shape"], item["data_offsets"]
        itemsize = DTYPE_NBYTES[dtype]
        if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in (begin, end, *shape)):
            raise ValueError
    except (TypeError, KeyError, ValueError) as error:
        raise Malformed(f"its header describes tensor {shortened(name)} in a way that makes no sense") from error
    if (nbytes := prod(shape) * itemsize) != end - begin:
        raise Malformed(f"tensor {shortened(name)} {tuple(shape)} needs {nbytes} bytes and has {end - begin}")
    return StoredTensor(dtype, tuple(shape), data_start + begin, data_start + end)


def _check_places(tensors: Mapping[str, StoredTensor], begin: int, size: int) -> None:
    end = begin
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != end:
            raise Malformed(
                f"tensor {shortened(name)} begins at byte {tensor.begin - begin}, the one before it ends at "
                f"{end - begin}"
            )
        end = tensor.end
    if end != size:
        verb = "is cut off" if size < end else "has bytes too many"
        raise Malformed(f"it {verb}: its header promises {end} bytes, it has {size}")


def _checksums(metadata: Mapping[str, str], count: int, text: bytes) -> tuple[int, ...] | None:
    if CHECKSUMS not in metadata and SEAL not in metadata:
        return None
    digits, seal = metadata.get(CHECKSUMS, ""), metadata.get(SEAL, "")
    unsealed = _replaced(text, SEAL, _NO_CHECKSUM)
    if seal != f"{zlib.crc32(unsealed):08x}" or len(digits) != len(_NO_CHECKSUM) * count:
        raise Malformed(
            "its header is not the one that its checksum is of. The file is damaged; or another program has written "
            "it with the metadata of one of ours, then remove the metadata that begin with gemini_memory"
        )
    return tuple(int(digits[at : at + 8], 16) for at in range(0, len(digits), 8))


def _replaced(text: bytes, key: str, digits: str) -> bytes:
    """The header with other digits for a key of its metadata, if it is written as we write it."""
    mark = f'"{key}":"'.encode()
    at = text.find(mark) + len(mark)
    return text[:at] + digits.encode() + text[at + len(digits) :] if at >= len(mark) else text


def shortened(name: str) -> str:
    """A name from a file, fit for a message."""
    return repr(name if len(name) <= 200 else f"{name[:200]}...")
