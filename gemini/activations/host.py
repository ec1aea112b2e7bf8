"""Saved tensors of a device in RAM: copies on two lanes beside the compute stream, ordered by marks.

::

    compute     -- block 0 --- block 1 --- block 2 --- ... --- block 1' --- block 0'
                     |            ^ memory of block 0 is          ^            ^
    to host          '-> saved 0 -| used again behind this mark   |            |
    to device                                             saved 1 '   saved 0 -'

The CPU waits for none of them. Memory that has been copied goes back to torch's allocator once the compute streams are
held behind the copy, and the allocator hands it out in the order of these streams. ``record_stream`` is for another
stream of the user's that uses what was brought back for the one of an earlier backward.
"""

from functools import partial

import torch
from torch import Tensor, UntypedStorage

from ..chunk import AcceleratorDriver, Lane, Ledger, Mark, Tier
from .host_blocks import HostBlocks


class HostPlace:
    """RAM for what leaves a device (a `Place`).

    Parameters
    ----------
    driver
        The driver of the device.
    ledger
        Is asked for RAM.
    limit_bytes
        The most RAM that is taken.
    pin
        Page-lock it. Copies from and to ordinary RAM make the training thread wait.
    """

    def __init__(self, driver: AcceleratorDriver, ledger: Ledger, limit_bytes: int, pin: bool) -> None:
        self._driver = driver
        self._blocks = HostBlocks(partial(driver.host_block, pin=pin), ledger, limit_bytes)
        self._to_host = driver.lane()
        self._to_device = driver.lane()
        self._streams: dict[Lane, None] = {driver.current(): None}
        """Those that have computed what was saved. Which of them a storage was allocated in torch does not tell."""

    def note_stream(self) -> None:
        self._streams[self._driver.current()] = None

    def reserve(self, memory: UntypedStorage) -> "HostRoom":
        return HostRoom(self, self._blocks.take(memory.nbytes()))

    def leave(self, memory: UntypedStorage, part: Tensor) -> "Leaving":
        """Copy a storage of the device to a part of a block."""
        for stream in self._streams:
            with stream.entered():
                self._to_host.follow_current()
        with self._to_host.entered():
            self._to_device.mark().hold()  # what came back may still be read from this part
        self._put(self._to_host, part, self._bytes_of(memory))
        return Leaving(self._to_host.mark(), memory, tuple(self._streams))

    def come(self, part: Tensor, after: Mark) -> tuple[UntypedStorage, "Coming"]:
        """Copy a part of a block to new memory of the device."""
        memory = self.new_memory(part.numel())
        with self._to_device.entered():
            after.hold()
        return memory.untyped_storage(), Coming(self._driver, self.copy_back(memory, part), memory)

    def new_memory(self, nbytes: int) -> Tensor:
        """Memory of the device (uint8) that may be copied to."""
        memory = torch.empty(nbytes, dtype=torch.uint8, device=self._driver.device)
        self._to_device.follow_current()  # until then the memory may be in use
        return memory

    def copy_back(self, memory: Tensor, part: Tensor) -> Mark:
        """Copy a part of a block to the device. Any thread may do so."""
        self._put(self._to_device, memory, part)
        return self._to_device.mark()

    def _bytes_of(self, memory: UntypedStorage) -> Tensor:
        return torch.empty(0, dtype=torch.uint8, device=self._driver.device).set_(memory)

    @staticmethod
    def _put(lane: Lane, into: Tensor, source: Tensor) -> None:
        try:
            lane.put(partial(into.copy_, source, non_blocking=True))
        except BaseException:
            lane.mark().wait()  # what has been put in uses memory that will be another's
            raise

    def give_back(self, part: Tensor) -> None:
        """Have a part of a block for others."""
        self._blocks.give_back(part)

    def arrival(self, memory: Tensor) -> "Arrival":
        """For memory that the calling thread has just allocated."""
        return Arrival(self._driver, memory)

    def rest(self) -> None:
        pass

    def trim(self) -> None:
        self._blocks.trim(self._wait)

    def _wait(self) -> None:
        for lane in (self._to_host, self._to_device):
            lane.mark().wait()

    def close(self) -> None:
        self._wait()


class HostRoom:
    """A part of a block for one storage (a `Room`)."""

    tier = Tier.HOST

    def __init__(self, place: HostPlace, part: Tensor) -> None:
        self.part = part
        self._place = place
        self._stored: Mark | None = None

    @property
    def taken_bytes(self) -> int:
        return self.part.numel()

    def store(self, memory: UntypedStorage) -> "Leaving":
        leaving = self._place.leave(memory, self.part)
        self._stored = leaving.mark
        return leaving

    def load(self) -> tuple[UntypedStorage, "Coming"]:
        assert self._stored is not None
        return self._place.come(self.part, self._stored)

    def release(self) -> None:
        self._place.give_back(self.part)


class Leaving:
    """A copy to RAM (a `Passage`)."""

    def __init__(self, mark: Mark, memory: UntypedStorage, streams: tuple[Lane, ...]) -> None:
        self.mark = mark
        self._memory = memory
        self._streams = streams

    def done(self) -> bool:
        return self.mark.reached()

    def wait(self) -> None:
        for stream in self._streams:
            with stream.entered():
                self.mark.hold()

    def rest(self, seconds: float) -> None:
        self.mark.wait()

    def call_off(self) -> bool:
        return False


class Coming:
    """A copy to the device (a `Passage`)."""

    def __init__(self, driver: AcceleratorDriver, mark: Mark, memory: Tensor) -> None:
        self._mark = mark
        self._arrival = Arrival(driver, memory)

    def done(self) -> bool:
        return self._mark.reached()

    def wait(self) -> None:
        self._arrival.behind(self._mark)

    def rest(self, seconds: float) -> None:
        self._mark.wait()

    def call_off(self) -> bool:
        return False


class Arrival:
    """New memory of the device, and the stream that it was allocated in."""

    def __init__(self, driver: AcceleratorDriver, memory: Tensor) -> None:
        self._driver = driver
        self._memory = memory
        self._stream = driver.current()

    def behind(self, mark: Mark) -> None:
        """Let the current stream use the memory behind a mark."""
        mark.hold()
        if self._driver.current() != self._stream:
            self._driver.outlast(self._memory)
