"""An accelerator in RAM whose streams run late, one step of a random one at a time, as far as marks allow."""

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock

import torch
from torch import Tensor

Work = Callable[[], object]


class FakeMark:
    """A `Mark` of a `FakeLane`."""

    def __init__(self, lane: "FakeLane", position: int) -> None:
        self.lane, self.position = lane, position

    def hold(self) -> None:
        with self.lane.owner.lock:
            self.lane.owner.current().behind(self)

    def wait(self) -> None:
        self.lane.owner.run_until(self)

    def reached(self) -> bool:
        return self.lane.done >= self.position


class FakeLane:
    """A `Lane` that does nothing by itself."""

    def __init__(self, owner: "FakeAccelerator") -> None:
        self.owner = owner
        self.done = 0
        self._work: list[tuple[list[FakeMark], Work]] = []
        self._behind: list[FakeMark] = []

    def behind(self, mark: FakeMark) -> None:
        self._behind.append(mark)

    def follow_current(self) -> None:
        with self.owner.lock:
            self.behind(self.owner.current().mark())

    @contextmanager
    def entered(self) -> Iterator[None]:
        before, self.owner.entered.lane = self.owner.current(), self
        try:
            yield
        finally:
            self.owner.entered.lane = before

    def put(self, work: Work) -> None:
        with self.owner.lock:
            self._work.append((self._behind, work))
            self._behind = []

    def mark(self) -> FakeMark:
        with self.owner.lock:
            return FakeMark(self, len(self._work))

    def can_go_on(self) -> bool:
        return self.done < len(self._work) and all(mark.reached() for mark in self._work[self.done][0])

    def go_on(self) -> None:
        self._work[self.done][1]()
        self.done += 1


class FakeAccelerator:
    """Stands in for `AcceleratorDriver`.

    A stream-ordered allocator hands memory on as soon as the compute stream needs it no more. Here nothing else gets
    it, but it is spoilt at that point of the compute stream, and again when it is taken.
    """

    def __init__(self, seed: int) -> None:
        self.device = torch.device("cpu")
        self.lock = RLock()
        self.host_blocks: list[bool] = []
        """For each that was asked for, whether it was to be page-locked."""
        self.hosts: set[int] = set()
        """Storages that count as being on the other side of the link, by address."""
        self._random = random.Random(seed)
        self._lanes: list[FakeLane] = []
        self.compute = self.lane()
        self.entered = threading.local()

    def lane(self) -> FakeLane:
        self._lanes.append(FakeLane(self))
        return self._lanes[-1]

    def current(self) -> FakeLane:
        return getattr(self.entered, "lane", self.compute)

    def run_until(self, mark: FakeMark) -> None:
        with self.lock:
            while not mark.reached():
                self._random.choice([lane for lane in self._lanes if lane.can_go_on()]).go_on()

    def drain(self) -> None:
        for lane in self._lanes:
            self.run_until(lane.mark())

    def spoil(self, memory: Tensor) -> None:
        self.compute.put(lambda: memory.fill_(float("nan")))

    def allocate(self, full: Tensor) -> None:
        self.spoil(full)

    def release(self, full: Tensor) -> None:
        self.spoil(full)

    def host_block(self, nbytes: int, pin: bool) -> Tensor:
        self.host_blocks.append(pin)
        return torch.zeros(nbytes, dtype=torch.uint8)

    def is_host(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.hosts

    def outlast(self, memory: Tensor) -> None:
        pass

    def trim(self) -> None:
        pass
