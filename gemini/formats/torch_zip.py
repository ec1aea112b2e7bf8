"""Files of ``torch.save``: zip archives of stored records, each with a CRC-32 that torch itself does not look at.

::

    local header | data | ... | directory | (zip64 end and its locator) | end

The directory at the end says where each record is. torch finds it with a library of its own and takes tensors from
where it points, so what two readers could understand in two ways is refused here: records that overlap, local headers
with other names, anything behind the end, and compression, which torch never writes.
"""

import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from mmap import ACCESS_READ, mmap
from pathlib import Path

from gemini.safe_files import open_regular

from .blocks import FileBytes
from .damage import Damaged, shown
from .team import Team

BEGINS = b"PK\x03\x04"

_END = struct.Struct("<4s4H2IH")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_MANY, _LARGE = 0xFFFF, 0xFFFFFFFF
"""In these fields: look at the zip64 ones."""

_BYTE_ARRAYS = (b"builtins\nbytearray\n", b"__builtin__\nbytearray\n")
"""As the only opcode for names that torch's unpickler knows has them."""

_LIMIT_RECORDS = 500_000
_PORTION_BYTES = 1 << 20
_PICKLE_BYTES, _PICKLE_BYTES_A_RECORD = 16 << 20, 2 << 10
"""What the pickle of names and shapes may have, at least and with each record. torch's own have 0.1 to 0.3 KiB, and
its unpickler turns each byte into up to 60 in memory."""


@dataclass(frozen=True, slots=True)
class Record:
    """One file in the archive."""

    name: str
    header: int
    """Where its local header begins."""
    start: int
    """Where its data begin."""
    nbytes: int
    crc32: int


def is_zip(path: Path) -> bool:
    """Whether a file begins as one of these; False for the format that torch wrote before 1.6."""
    with FileBytes(path) as file:
        return file.nbytes >= len(BEGINS) and file.read(0, len(BEGINS), "its beginning") == BEGINS


def check_zip(path: Path) -> None:
    """Look at the directory of the archive, and at the names and shapes in it, alone.

    Raises
    ------
    Damaged
        If the archive is none that torch has written.
    """
    with FileBytes(path) as file:
        read_records(file)


def refuse_byte_arrays(path: Path) -> None:
    """Raise `Damaged` if a pickle in a file of any format makes a ``bytearray``, whose length is a mere number."""
    with open(open_regular(path), "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return
        with mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            if any(content.find(name) >= 0 for name in _BYTE_ARRAYS):
                raise Damaged(f"{path} has a pickle that makes byte arrays, which can be of any length")


def verify_zip(path: Path, tell: Callable[[int], None] = lambda nbytes: None) -> bool:
    """Compare every record with its checksum.

    Returns
    -------
    bool
        False if the file has no checksums (``torch.serialization.set_crc32_options(False)``).

    Raises
    ------
    Damaged
        If one is another, or the archive is none that torch has written.
    """
    with FileBytes(path) as file:
        records = read_records(file)
        if not any(record.crc32 for record in records):
            return False

        def check(together: list[Record], _: None) -> int:
            for record in together:
                if file.crc32(record.start, record.nbytes, record.name, tell) != record.crc32:
                    raise Damaged(f"{path} has other bytes than were saved in its record {shown(record.name)}")
            return sum(record.nbytes for record in together)

        with Team(lambda: None) as team:
            for portion in _portions(records):
                team.do(partial(check, portion))
    return True


def _portions(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Records that a thread takes at once: handing over a thousand small ones takes longer than to read them."""
    portion: list[Record] = []
    nbytes = 0
    for record in records:
        portion.append(record)
        nbytes += record.nbytes + _LOCAL.size
        if nbytes > _PORTION_BYTES:
            yield portion
            portion, nbytes = [], 0
    if portion:
        yield portion


def pickle_limit(records: int) -> int:
    """Bytes that the pickle of an archive with this number of records may have."""
    return _PICKLE_BYTES + _PICKLE_BYTES_A_RECORD * records


def read_records(file: FileBytes) -> list[Record]:
    """All records, in the order of their places.

    Raises
    ------
    Damaged
        If the archive is none that torch has written.
    """
    records = sorted(_directory(file), key=lambda record: record.header)
    names = {record.name for record in records}
    if len(names) != len(records):
        raise _fault(file, "two of its records have one name")
    end = 0
    for record in records:
        if record.header < end:
            raise _fault(file, f"its record {shown(record.name)} overlaps another one")
        end = record.start + record.nbytes
    pickles = [record for record in records if record.name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise _fault(file, f"it has {len(pickles)} records that end in /data.pkl")
    (pickled,) = pickles
    if pickled.nbytes > pickle_limit(len(records)):
        raise _fault(file, f"its pickle has {pickled.nbytes} bytes, too many for {len(records)} records")
    text = file.read(pickled.start, pickled.nbytes, "its pickle")
    if any(record.crc32 for record in records) and zlib.crc32(text) != pickled.crc32:
        raise _fault(file, "the checksum of its pickle is another one")
    if any(name in text for name in _BYTE_ARRAYS):
        raise _fault(file, "its pickle makes byte arrays, which can be of any length")
    return records


def _directory(file: FileBytes) -> list[Record]:
    start, nbytes, count = _end(file)
    if count > _LIMIT_RECORDS:
        raise _fault(file, f"it has {count} records; {_LIMIT_RECORDS} are allowed")
    text = file.read(start, nbytes, "its directory")
    records, at = [], 0
    for _ in range(count):
        if at + _ENTRY.size > nbytes:
            raise _fault(file, "its directory is too short")
        fields = _ENTRY.unpack_from(text, at)
        signature, method, crc32 = fields[0], fields[4], fields[7]
        name_nbytes, extra_nbytes, comment_nbytes = fields[10:13]
        at += _ENTRY.size
        name, extra = text[at : at + name_nbytes], text[at + name_nbytes : at + name_nbytes + extra_nbytes]
        at += name_nbytes + extra_nbytes + comment_nbytes
        if signature != b"PK\x01\x02" or at > nbytes:
            raise _fault(file, "its directory is damaged")
        if method or fields[3] & 1:
            raise _fault(file, f"its record {_called(name)} is compressed or encrypted, which torch.save never does")
        size, stored, header = _large(file, extra, [fields[9], fields[8], fields[16]])
        if size != stored:
            raise _fault(file, f"its record {_called(name)} has two sizes")
        records.append(_record(file, name, header, size, crc32, start))
    if at != nbytes:
        raise _fault(file, "its directory is too long")
    return records


def _end(file: FileBytes) -> tuple[int, int, int]:
    """Where the directory begins, its bytes, and its entries."""
    at = file.nbytes - _END.size
    if at < 0:
        raise _fault(file, f"it is {file.nbytes} bytes long")
    signature, *disks, count, nbytes, start, comment = _END.unpack(file.read(at, _END.size, "its end"))
    if signature != b"PK\x05\x06" or comment:
        raise _fault(file, "it is cut off, or something is behind its end")
    here, total = disks[2], count
    locator = at - _LOCATOR.size
    if locator >= _END_64.size and file.read(locator, 4, "its end") == b"PK\x06\x07":
        _, _, where, _ = _LOCATOR.unpack(file.read(locator, _LOCATOR.size, "its end"))
        at = locator - _END_64.size
        signature, _, _, _, _, _, here_64, total_64, nbytes_64, start_64 = _END_64.unpack(
            file.read(at, _END_64.size, "its end")
        )
        pairs = ((count, total_64, _MANY), (nbytes, nbytes_64, _LARGE), (start, start_64, _LARGE))
        if signature != b"PK\x06\x06" or where != at or any(old not in (new, full) for old, new, full in pairs):
            raise _fault(file, "its end is damaged")
        here, total, nbytes, start = here_64, total_64, nbytes_64, start_64
    if here != total or start + nbytes != at:
        raise _fault(file, "its directory is not where its end says")
    return start, nbytes, total


def _large(file: FileBytes, extra: bytes, fields: list[int]) -> list[int]:
    """Sizes and offset, from the zip64 field where they do not fit into the others."""
    missing = [index for index, value in enumerate(fields) if value == _LARGE]
    at = 0
    while missing and at + 4 <= len(extra):
        kind, nbytes = struct.unpack_from("<2H", extra, at)
        if kind == 1 and nbytes >= 8 * len(missing) and at + 4 + nbytes <= len(extra):
            for place, index in enumerate(missing):
                (fields[index],) = struct.unpack_from("<Q", extra, at + 4 + 8 * place)
            return fields
        at += 4 + nbytes
    if missing:
        raise _fault(file, "its directory lacks the size of a record")
    return fields


def _record(file: FileBytes, name: bytes, header: int, nbytes: int, crc32: int, limit: int) -> Record:
    if header + _LOCAL.size > limit:
        raise _fault(file, f"its record {_called(name)} begins beyond the end")
    text = file.read(header, min(_LOCAL.size + len(name), limit - header), "the header of a record")
    local = _LOCAL.unpack_from(text)
    start = header + _LOCAL.size + local[9] + local[10]
    if local[0] != BEGINS or local[3] or start + nbytes > limit:
        raise _fault(file, f"its record {_called(name)} is not where its directory says")
    if local[9] != len(name) or text[_LOCAL.size :] != name:
        raise _fault(file, f"its record {_called(name)} has another name in its place")
    return Record(name.decode(errors="surrogateescape"), header, start, nbytes, crc32)


def _called(name: bytes) -> str:
    return shown(name.decode(errors="replace"))


def _fault(file: FileBytes, what: str) -> Damaged:
    return Damaged(f"{file.path} is not a whole file of torch.save: {what}")
