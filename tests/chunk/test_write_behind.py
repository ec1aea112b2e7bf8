"""Writes that nobody waits for: all there after a flush, none lost to an error, and never a hang."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from gemini.chunk import MemoryBuffer, Staging, Tier
from gemini.chunk.staging import pieces
from gemini.chunk.write_behind import WriteBehind
from gemini.errors import OffloadError

pytestmark = pytest.mark.timeout(30)
BLOCK_NUMEL = 64


class Slow(MemoryBuffer):
    """Writes when it is allowed to, and fails at the calls whose numbers are given."""

    def __init__(self, numel: int, *failing: int) -> None:
        super().__init__(Tier.DISK, torch.zeros(numel))
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.calls = 0
        self._failing = failing

    def write(self, start: int, source: Tensor) -> None:
        assert self.may_go_on.wait(20)
        number, self.calls = self.calls, self.calls + 1
        if number in self._failing:
            raise OffloadError(5, f"call {number} fails")
        super().write(start, source)


@pytest.fixture
def behind() -> Iterator[WriteBehind]:
    found = WriteBehind(Staging(3, BLOCK_NUMEL))
    yield found
    found.close()


def test_pieces_are_cut_at_multiples_and_know_their_offset() -> None:
    assert list(pieces(100, 300, 64)) == [(100, 128, 36), (128, 192, 0), (192, 256, 0), (256, 300, 0)]
    assert list(pieces(130, 140, 64)) == [(130, 140, 2)] and list(pieces(5, 5, 64)) == []


def test_after_a_flush_everything_is_there_and_the_sources_may_have_changed(behind: WriteBehind) -> None:
    buffer, expected = Slow(1000), torch.zeros(1000)
    for start, stop in ((3, 500), (500, 501), (700, 1000)):
        source = torch.randn(stop - start)
        expected[start:stop] = source
        behind.write(buffer, start, source)
        source.fill_(float("nan"))
    behind.flush()
    behind.flush()
    assert torch.equal(buffer.tensor, expected)


def test_a_write_returns_before_the_disk_has_it(behind: WriteBehind) -> None:
    buffer = Slow(BLOCK_NUMEL)
    buffer.may_go_on.clear()
    behind.write(buffer, 0, torch.ones(BLOCK_NUMEL))
    assert buffer.calls == 0
    buffer.may_go_on.set()
    behind.flush()
    assert buffer.calls == 1 and buffer.tensor.all()


@pytest.mark.parametrize("failing", range(7))
def test_a_failure_of_any_one_write_surfaces_and_costs_nothing(behind: WriteBehind, failing: int) -> None:
    buffer, value = Slow(7 * BLOCK_NUMEL, failing), torch.randn(7 * BLOCK_NUMEL)
    errors = []
    for start in range(0, 7 * BLOCK_NUMEL, BLOCK_NUMEL):
        try:
            behind.write(buffer, start, value[start : start + BLOCK_NUMEL])
        except OffloadError as error:  # it was not taken
            errors.append(error)
            behind.flush()
            behind.write(buffer, start, value[start : start + BLOCK_NUMEL])
    try:
        behind.flush()
    except OffloadError as error:
        errors.append(error)
        behind.flush()
    assert [str(error) for error in errors] == [f"[Errno 5] call {failing} fails"]
    assert torch.equal(buffer.tensor, value)


def test_a_broken_disk_raises_each_time_and_what_is_given_up_is_forgotten(behind: WriteBehind) -> None:
    broken, sound = Slow(10 * BLOCK_NUMEL, *range(1000)), Slow(10 * BLOCK_NUMEL)
    for _ in range(3):
        with pytest.raises(OffloadError):
            behind.write(broken, 0, torch.ones(10 * BLOCK_NUMEL))
        with pytest.raises(OffloadError):
            behind.flush()
    behind.discard()
    behind.write(sound, 0, torch.ones(10 * BLOCK_NUMEL))
    behind.flush()
    assert sound.tensor.all() and not broken.tensor.any()


def test_without_staging_a_write_is_over_at_once() -> None:
    behind, buffer = WriteBehind(None), Slow(100)
    behind.write(buffer, 50, torch.ones(50))
    assert buffer.tensor[50:].all()
    behind.flush()
    behind.discard()
    behind.close()


def test_closing_finishes_what_is_under_way(behind: WriteBehind) -> None:
    buffer = Slow(BLOCK_NUMEL)
    behind.write(buffer, 0, torch.ones(BLOCK_NUMEL))
    behind.close()
    assert buffer.tensor.all()


def test_who_waits_for_one_buffer_finds_it_written_while_another_is_not(behind: WriteBehind) -> None:
    slow, quick = Slow(BLOCK_NUMEL), Slow(BLOCK_NUMEL)
    behind.write(quick, 0, torch.ones(BLOCK_NUMEL))
    slow.may_go_on.clear()
    behind.write(slow, 0, torch.ones(BLOCK_NUMEL))
    behind.wait_for(quick)
    assert bool(quick.tensor.all()) and not slow.tensor.any()
    slow.may_go_on.set()
    behind.wait_for(slow)
    assert bool(slow.tensor.all())


def test_an_error_is_told_to_who_waits_for_its_buffer_and_to_the_flush(behind: WriteBehind) -> None:
    failing, sound = Slow(BLOCK_NUMEL, 0), Slow(BLOCK_NUMEL)
    for buffer in (failing, sound):
        behind.write(buffer, 0, torch.ones(BLOCK_NUMEL))
    behind.wait_for(sound)
    for work in (lambda: behind.wait_for(failing), behind.flush):
        with pytest.raises(OffloadError, match="call 0 fails"):
            work()
    behind.flush()
    assert bool(failing.tensor.all())


def test_a_write_that_could_not_be_handed_over_costs_no_block(
    behind: WriteBehind, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer, source = Slow(1000), torch.randn(1000)

    def no_memory(*args: object) -> None:
        raise MemoryError

    for _ in range(10):  # there are three blocks
        with monkeypatch.context() as patch:
            patch.setattr(ThreadPoolExecutor, "submit", no_memory)
            with pytest.raises(MemoryError):
                behind.write(buffer, 0, source)
    behind.write(buffer, 0, source)
    behind.flush()
    assert torch.equal(buffer.tensor, source)
