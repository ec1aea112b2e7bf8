"""The disk tier: homes in one `DiskFile`, each from a page boundary on."""

import errno
import sys
from collections.abc import Iterable
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from gemini.errors import OffloadError, OutOfMemory
from gemini.sizes import format_bytes

from .buffer import Buffer
from .checksums import Checksums, Piece
from .disk_file import PAGE_BYTES, DiskFile, Requests
from .free_room import FreeRoom
from .ledger import Ledger
from .tier import Tier


class DiskBackend:
    """Makes disk buffers in one folder (a `TierMemory`).

    The file grows when no freed home leaves a gap that is large enough, and does not shrink.

    Parameters
    ----------
    folder
        Where the file lives; made if it does not exist.
    ledger
        Asked for every byte.
    requests, direct
        See `DiskFile`.
    checksums
        Remember the CRC-32 of all that is written, and compare what is read with it.

    Raises
    ------
    OffloadError
        If the folder cannot be made or written to.
    """

    tier = Tier.DISK
    granularity = PAGE_BYTES

    def __init__(
        self,
        folder: Path,
        ledger: Ledger,
        requests: Requests | None = None,
        direct: bool = True,
        checksums: bool = False,
    ) -> None:
        self.file = DiskFile(folder, requests, direct)
        self._ledger = ledger
        self._checksums = checksums
        self._room = FreeRoom(sys.maxsize)
        self._lock = Lock()

    @property
    def folder(self) -> Path:
        return self.file.folder

    @property
    def read_bytes(self) -> int:
        return self.file.read_bytes

    @property
    def written_bytes(self) -> int:
        return self.file.written_bytes

    @property
    def read_seconds(self) -> float:
        return self.file.read_seconds

    @property
    def write_seconds(self) -> float:
        return self.file.write_seconds

    def allocate(self, numel: int, dtype: torch.dtype, what: str) -> "DiskBuffer":
        """Take room for ``numel`` zeros.

        Raises
        ------
        OutOfMemory
            If the ledger or the file system has no room.
        OffloadError
            If the file cannot be written to.
        """
        return self._allocate(numel, dtype, what, is_cleared=True)

    def _allocate(self, numel: int, dtype: torch.dtype, what: str, is_cleared: bool) -> "DiskBuffer":
        nbytes = numel * dtype.itemsize
        room = _pages(nbytes)
        self._ledger.take(Tier.DISK, room, what)
        with self._lock:
            offset = self._room.take(room)
            assert offset is not None, "the last gap has no end"
            try:
                self._prepare(offset, room, nbytes, what, is_cleared)
            except BaseException:
                self._room.give(offset, room)
                self._ledger.give(Tier.DISK, room)
                raise
        checksums = Checksums() if self._checksums else None
        return DiskBuffer(self.file, offset, numel, dtype, what, checksums)

    def beside(self, buffer: "DiskBuffer") -> "DiskBuffer":
        """Room for other values of a home, which has anything in it.

        Raises
        ------
        OutOfMemory, OffloadError
            As `allocate`.
        """
        return self._allocate(buffer.numel, buffer.dtype, buffer.what, is_cleared=False)

    def exchange(self, buffer: "DiskBuffer", other: "DiskBuffer") -> None:
        """Have a home be where ``other`` is, with the values there, and free where it was. Nobody may be using either.

        Moves no data.
        """
        other.take(buffer.take(other.place))
        self.free(other)

    def _prepare(self, offset: int, room: int, nbytes: int, what: str, is_cleared: bool) -> None:
        """Have ``room`` bytes of the file, and zeros in them if they are to be cleared."""
        if is_cleared:
            self.file.clear(offset, min(room, max(self.file.nbytes - offset, 0)), what)
        try:
            self.file.reserve(offset, room)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise OffloadError(
                    error.errno, f"{self.folder}: {error.strerror}, taking {format_bytes(nbytes)} for {what}"
                ) from error
            raise OutOfMemory(
                f"disk tier out of memory. {what} needs {format_bytes(nbytes)} in {str(self.folder)!r}, the file "
                f"system is full after {format_bytes(self.file.nbytes)} of ours ({error.strerror}); free some room, or "
                "set offload_dir to another disk"
            ) from error

    def free(self, buffer: Buffer) -> None:
        """Have a buffer's pages for later ones."""
        assert isinstance(buffer, DiskBuffer)
        room = _pages(buffer.nbytes)
        with self._lock:
            self._room.give(buffer.offset, room)
        self._ledger.give(Tier.DISK, room)

    def close(self) -> None:
        """Give the file back to the system. Idempotent."""
        self.file.close()


def _pages(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


_Place = tuple[int, Checksums | None]


class DiskBuffer(Buffer):
    """A home in a `DiskFile`, from ``offset`` on."""

    tier = Tier.DISK
    tensor: Tensor | None = None

    def __init__(
        self, file: DiskFile, offset: int, numel: int, dtype: torch.dtype, what: str, checksums: Checksums | None
    ) -> None:
        self.numel = numel
        self.dtype = dtype
        self._file = file
        self.offset = offset
        self._what = what
        self._checksums = checksums

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def what(self) -> str:
        """What is in it, in words."""
        return self._what

    @property
    def place(self) -> _Place:
        """Where it is, and what was written there."""
        return self.offset, self._checksums

    def take(self, place: _Place) -> _Place:
        """Be at another place, with what was written there. Returns the place until now."""
        before = self.place
        self.offset, self._checksums = place
        return before

    def read(self, start: int, out: Tensor) -> None:
        begin, nbytes = self._range(start, out)
        self._file.read(self.offset + begin, out.data_ptr(), nbytes, self._what)
        if self._checksums is not None:
            self._check(self._checksums.disagreeing(begin, out.data_ptr(), nbytes))
            for piece in self._checksums.overlapping(begin, begin + nbytes):
                self._check_whole(piece, self._checksums)

    def _check_whole(self, piece: Piece, checksums: Checksums) -> None:
        """Read what was written as one piece and read only in part."""
        nbytes = piece.end - piece.begin
        whole = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        self._file.read(self.offset + piece.begin, whole.data_ptr(), nbytes, self._what)
        if checksums.disagrees(piece, whole.data_ptr()):
            self._check([(piece.begin, piece.end)])

    def _check(self, disagreeing: Iterable[tuple[int, int]]) -> None:
        for begin, end in disagreeing:
            raise OffloadError(
                errno.EIO,
                f"{self._file.folder}: bytes {begin} to {end} of {self._what} are not what was written there; the disk "
                f"corrupts data, or something else writes to it. Set offload_dir to another disk and go on from the "
                "last checkpoint",
            )

    def write(self, start: int, source: Tensor) -> None:
        begin, nbytes = self._range(start, source)
        if self._checksums is not None:
            self._checksums.forget(begin, begin + nbytes)  # a write that fails leaves anything
        self._file.write(self.offset + begin, source.data_ptr(), nbytes, self._what)
        if self._checksums is not None:
            self._checksums.remember(begin, source.data_ptr(), nbytes)

    def _range(self, start: int, tensor: Tensor) -> tuple[int, int]:
        assert tensor.dtype is self.dtype and tensor.is_contiguous() and tensor.device.type == "cpu"
        assert 0 <= start and start + tensor.numel() <= self.numel, "this would be another buffer's"
        return start * self.dtype.itemsize, tensor.numel() * self.dtype.itemsize
