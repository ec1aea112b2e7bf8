"""Reading, computing and writing go on from one update to the next, as far as none reads what another still writes."""

import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from update_rig import BLOCK_NUMEL, BUFFERS, IN_RAM, ON_DISK, Faults, rig, wait_for_all

from gemini.chunk import Staging
from gemini.errors import OffloadError
from gemini.updates.update_pipeline import BLOCK_SETS

pytestmark = pytest.mark.timeout(60)

SECONDS = 10
"""A bound: who waits as long as this waits in vain."""


class SlowWrites:
    """A disk that records what begins and ends, and ends no write to a chunk before something else has begun."""

    def __init__(self, chunk: int, until: tuple[str, int], at_most: float = SECONDS) -> None:
        self.log: list[tuple[str, str, int]] = []
        self._chunk, self._until, self._at_most = chunk, until, at_most
        self._begun = threading.Event()
        self._armed = threading.Event()
        self.writes = threading.Event()

    def arm(self) -> None:
        """What begins from now on counts."""
        self._armed.set()

    def begin(self, verb: str, chunk: int) -> None:
        self.log.append(("begin", verb, chunk))
        if self._armed.is_set() and (verb, chunk) == self._until:
            self._begun.set()
        if (verb, chunk) == ("write", self._chunk):
            self.writes.set()
            self._begun.wait(self._at_most)

    def end(self, verb: str, chunk: int) -> None:
        self.log.append(("end", verb, chunk))


def test_the_next_update_is_read_before_the_one_before_it_is_written(tmp_path: Path) -> None:
    disk = SlowWrites(chunk=1, until=("read", 2))
    disk.arm()
    with rig(tmp_path, [ON_DISK] * 3, disk, tensors=1) as r:
        tickets = r.submit(1)  # of one block; chunk 0 has no gradient
        assert disk.writes.wait(SECONDS)
        tickets += r.submit(2)
        wait_for_all(tickets)
        r.check()
    assert disk.log.index(("begin", "read", 2)) < disk.log.index(("end", "write", 1))


def test_what_an_update_still_writes_is_not_read_by_the_next_of_the_same_chunk(tmp_path: Path) -> None:
    disk = SlowWrites(chunk=1, until=("read", 1), at_most=0.3)
    with rig(tmp_path, [ON_DISK] * 2, disk, tensors=1) as r:
        tickets = r.submit(1)
        assert disk.writes.wait(SECONDS)
        disk.arm()
        before = len(disk.log)
        tickets += r.submit(1)
        wait_for_all(tickets)
        r.check()
    again = disk.log[before:].index(("begin", "read", 1))
    roles_written = len(BUFFERS) - 1
    assert disk.log[: before + again].count(("end", "write", 1)) == roles_written


def test_what_lies_in_ram_does_not_hold_up_the_reading_of_the_next(tmp_path: Path) -> None:
    disk = SlowWrites(chunk=1, until=("read", 3))
    disk.arm()
    with rig(tmp_path, [ON_DISK, ON_DISK, IN_RAM, ON_DISK], disk, tensors=1) as r:
        tickets = r.submit(1)
        assert disk.writes.wait(SECONDS)
        tickets += [*r.submit(2), *r.submit(3)]
        wait_for_all(tickets)
        r.check()
    assert disk.log.index(("begin", "read", 3)) < disk.log.index(("end", "write", 1))


class CountedStaging(Staging):
    """Never makes anyone wait: who would have to is told."""

    def __init__(self) -> None:
        super().__init__(BLOCK_SETS * len(BUFFERS), BLOCK_NUMEL)
        self.lent = self.most = 0

    def borrow(self):  # type: ignore[no-untyped-def]
        self.lent += 1
        self.most = max(self.most, self.lent)
        assert self.lent <= self.count, "more blocks than there are"
        return super().borrow()

    def give_back(self, block) -> None:  # type: ignore[no-untyped-def]
        self.lent -= 1
        super().give_back(block)


@pytest.mark.parametrize("failing", [(), range(3, 300, 17)], ids=["sound", "failing"])
def test_staging_for_three_blocks_is_all_that_is_used_over_many_updates(tmp_path: Path, failing: range) -> None:
    staging = CountedStaging()
    with rig(tmp_path, [ON_DISK, IN_RAM, ON_DISK], Faults(*failing), numel=100) as r:
        r.queue._staging = r.queue._pipeline._staging = staging
        tickets = [ticket for index in (0, 1, 2, 0, 2, 1, 1, 0) for ticket in r.submit(index)]
        assert bool(wait_for_all(tickets)) == bool(failing)
        r.check()
    assert staging.most == staging.count
    assert staging.lent == 0


def test_when_the_first_of_several_updates_fails_all_wait_and_go_on_in_order(tmp_path: Path) -> None:
    class FailingOnce(SlowWrites):
        has_failed = False

        def end(self, verb: str, chunk: int) -> None:
            if (verb, chunk, self.has_failed) == ("write", 1, False):
                self.has_failed = True
                raise OffloadError(5, "once")
            super().end(verb, chunk)

    disk = FailingOnce(chunk=1, until=("read", 2))
    disk.arm()
    with rig(tmp_path, [ON_DISK] * 4, disk, tensors=1) as r:
        tickets = r.submit(1)
        assert disk.writes.wait(SECONDS)
        tickets += [*r.submit(2), *r.submit(3)]  # the first fails when the second is being read
        with pytest.raises(OffloadError, match="once"):
            tickets[0].wait()
        assert wait_for_all(tickets) == []
        r.check()
    assert disk.has_failed
    assert disk.log.count(("end", "read", 1)) == len(BUFFERS)  # the retry has kept what was computed


class RearrangingStaging(Staging):
    """Whenever it lends a block, another thread wants to arrange what waits anew."""

    def __init__(self, arrange: Callable[[], None]) -> None:
        super().__init__(BLOCK_SETS * len(BUFFERS), BLOCK_NUMEL)
        self.arrange = arrange
        self.threads: list[threading.Thread] = []

    def borrow(self):  # type: ignore[no-untyped-def]
        self.threads.append(threading.Thread(target=self.arrange))
        self.threads[-1].start()
        self.threads[-1].join(0.01)  # it may have to wait for us
        return super().borrow()


@pytest.mark.parametrize("failing", [(), range(3, 300, 17)], ids=["sound", "failing"])
def test_updates_that_are_arranged_while_one_begins_are_all_done_once(tmp_path: Path, failing: range) -> None:
    with rig(tmp_path, [ON_DISK] * 4, Faults(*failing), numel=100) as r:
        rng = random.Random(0)
        staging = RearrangingStaging(lambda: r.queue.arrange(rng.sample(r.chunks, len(r.chunks))))
        r.queue._staging = r.queue._pipeline._staging = staging
        tickets = [ticket for index in (0, 1, 2, 3) * 2 for ticket in r.submit(index)]
        wait_for_all(tickets)
        for thread in staging.threads:
            thread.join(SECONDS)
        r.check()
