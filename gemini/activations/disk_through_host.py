"""Saved tensors of a device on DISK, where RAM has no room for them: they pass through some of it.

::

    device  --lane-->  a part of RAM  --writing thread-->  file        the device's memory is free after the first arrow
    device  <--lane--  a part of RAM  <--reading thread--  file        the part is free after both
"""

import logging
from functools import partial

from torch import Tensor, UntypedStorage

from ..chunk import Mark, Tier
from ..errors import OutOfMemory
from .disk import ActivationFile, FileRoom, Underway
from .host import Arrival, Coming, HostPlace, HostRoom
from .place import Passage

logger = logging.getLogger(__name__)


class DiskThroughHost:
    """A file for what leaves a device (a `Place`).

    Parameters
    ----------
    host
        RAM to pass through, and the lanes.
    file
        Where they stay.
    """

    def __init__(self, host: HostPlace, file: ActivationFile) -> None:
        self._host = host
        self._file = file
        self._passing: list[_Room] = []
        """Rooms that have RAM, as far as their storages have been copied there."""
        self._reading: list[tuple[_Reading, HostRoom]] = []
        self._has_failed = False

    def note_stream(self) -> None:
        self._host.note_stream()

    def reserve(self, memory: UntypedStorage) -> "_Room":
        passed = self.pass_through(memory)
        try:
            room = self._file.room_for(passed.part.data_ptr(), memory.nbytes())
        except BaseException:
            passed.release()
            raise
        return _Room(self, passed, room)

    def pass_through(self, memory: UntypedStorage) -> HostRoom:
        """RAM for as many bytes, once others have passed."""
        while True:
            self._end_passed()
            try:
                return self._host.reserve(memory)
            except OutOfMemory:
                under_way = [room for room in self._passing if room.is_under_way]
                if under_way:
                    under_way[0].rest()
                elif self._reading:
                    self._reading[0][0].rest(float("inf"))
                else:
                    raise

    def _end_passed(self) -> None:
        self._passing = [room for room in self._passing if not room.has_passed()]
        readings, self._reading = self._reading, []
        for reading, passed in readings:
            if reading.done():
                passed.release()
            else:
                self._reading.append((reading, passed))

    def write(self, room: "_Room", part: Tensor, into: FileRoom, after: Mark) -> Underway[None]:
        """Have a part of RAM written once it has what is copied to it."""
        self._passing.append(room)
        return self._file.write(partial(_write, part, into, after))

    def read(self, source: FileRoom, nbytes: int) -> tuple[UntypedStorage, "_Reading"]:
        """Have memory of the device filled from the file."""
        memory = self._host.new_memory(nbytes)
        passed = self.pass_through(memory.untyped_storage())
        work = partial(self._read, source, memory, passed.part)
        reading = _Reading(self._file.read(work), self._host.arrival(memory))
        self._reading.append((reading, passed))
        return memory.untyped_storage(), reading

    def failed(self, error: BaseException | None) -> None:
        """Something could not be written; its storage stays in RAM."""
        if not self._has_failed:
            logger.warning("tensors saved for backward stay in RAM, and training goes on: %s", error)
        self._has_failed = True

    def _read(self, source: FileRoom, memory: Tensor, part: Tensor) -> Mark:
        source.read(part)
        return self._host.copy_back(memory, part)

    def rest(self) -> None:
        for room in self._passing:
            room.rest()
        for reading, _ in self._reading:
            reading.rest(float("inf"))
        self._end_passed()

    def trim(self) -> None:
        self._end_passed()
        self._host.trim()
        self._file.trim()

    def close(self) -> None:
        self._file.close()
        self._host.close()


def _write(part: Tensor, into: FileRoom, after: Mark) -> None:
    after.wait()
    into.write(part)


class _Room:
    """The bytes of one storage in the file, and in RAM until they are there (a `Room`)."""

    tier = Tier.DISK

    def __init__(self, place: DiskThroughHost, passed: HostRoom, room: FileRoom) -> None:
        self.taken_bytes = room.taken_bytes
        self._nbytes = passed.taken_bytes
        self._place = place
        self._passed: HostRoom | None = passed
        self._room = room
        self._written: Underway[None] | None = None
        self._coming: Coming | None = None
        """A copy from RAM to the device: nothing else may go to this RAM before it is over."""
        self._is_released = False
        self._has_failed = False

    def store(self, memory: UntypedStorage) -> Passage:
        assert self._passed is not None
        leaving = self._passed.store(memory)
        self._written = self._place.write(self, self._passed.part, self._room, leaving.mark)
        return leaving

    def load(self) -> tuple[UntypedStorage, Passage]:
        if self._passed is None:
            return self._place.read(self._room, self._nbytes)
        memory, self._coming = self._passed.load()
        return memory, self._coming

    def release(self) -> None:
        self._is_released = True
        if self._written is not None:
            self._written.call_off()
        if self._written is None or self._passed is None:
            self._end()

    @property
    def is_under_way(self) -> bool:
        """True if its RAM will be free in a while."""
        return not self._has_failed or self._is_released

    def rest(self) -> None:
        """Return when nothing uses its RAM."""
        if self._written is not None:
            self._written.rest(float("inf"))
        if self._coming is not None:
            self._coming.rest(float("inf"))

    def has_passed(self) -> bool:
        """Give the RAM back if the file has what it had, or nothing wants it; False if it has RAM still."""
        if self._passed is None:
            return True
        if self._written is None or not self._written.done() or (self._coming is not None and not self._coming.done()):
            return False
        if not self._is_released and not self._written.has_result():
            self._fail(self._written)
            return False
        self._end()
        return True

    def _fail(self, written: Underway[None]) -> None:
        if not self._has_failed:
            self._has_failed = True
            self._place.failed(written.error())

    def _end(self) -> None:
        if self._passed is not None:
            self._passed.release()
            self._passed = None
        if self._is_released:
            self._room.release()


class _Reading:
    """A read from the file and a copy to the device behind it (a `Passage`)."""

    def __init__(self, read: Underway[Mark], arrival: Arrival) -> None:
        self._read = read
        self._arrival = arrival

    def done(self) -> bool:
        return self._read.done() and (not self._read.has_result() or self._read.result().reached())

    def wait(self) -> None:
        self._arrival.behind(self._read.result())

    def rest(self, seconds: float) -> None:
        self._read.rest(seconds)
        if self._read.has_result():
            self._read.result().wait()

    def call_off(self) -> bool:
        return self._read.call_off()
