"""Threads that share tasks: all are done, an error ends the work, and refused threads are done without."""

import signal
import threading
from collections.abc import Callable
from contextlib import suppress

import pytest
from interrupting import AtLine

from gemini.formats.team import Team


def task(done: list[int], number: int) -> Callable[[list[int]], int]:
    def work(buffer: list[int]) -> int:
        buffer.append(number)
        done.append(number)
        return 10

    return work


@pytest.mark.parametrize("count", [0, 1, 4])
def test_all_tasks_are_done_and_told_of(count: int) -> None:
    done: list[int] = []
    told: list[int] = []
    with Team(list, told.append, count=count) as team:
        for number in range(100):
            team.do(task(done, number))
    assert sorted(done) == list(range(100))
    assert told == sorted(told) and told[-1] == 1000


def test_each_thread_has_a_buffer_of_its_own() -> None:
    buffers: list[list[int]] = []

    def make() -> list[int]:
        buffers.append([])
        return buffers[-1]

    meeting = threading.Barrier(3, timeout=30)

    def work(buffer: list[int]) -> int:
        meeting.wait()  # the three of them at once
        buffer.append(threading.get_ident())
        return 1

    with Team(make, count=3) as team:
        for _ in range(3):
            team.do(work)
    assert sorted(map(len, buffers)) == [0, 1, 1, 1]


@pytest.mark.parametrize("count", [0, 2])
def test_an_error_is_raised_and_later_tasks_are_dropped(count: int) -> None:
    done: list[int] = []

    def fail(buffer: list[int]) -> int:
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"), Team(list, count=count) as team:
        team.do(fail)
        for number in range(100):
            team.do(task(done, number))
    assert len(done) < 100
    assert not [thread for thread in threading.enumerate() if thread.name == "gemini-memory-file"]


def test_an_error_of_the_caller_ends_the_threads() -> None:
    with pytest.raises(KeyboardInterrupt), Team(list, count=2):
        raise KeyboardInterrupt
    assert not [thread for thread in threading.enumerate() if thread.name == "gemini-memory-file"]


def test_ctrl_c_before_any_line_ends_the_threads() -> None:
    def work() -> None:
        with Team(list, count=2) as team:
            for number in range(5):
                team.do(task([], number))

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        counting = AtLine()
        with counting.armed():
            work()
        for place, times in counting.counts.items():
            for nth in {1, times}:
                with suppress(KeyboardInterrupt), AtLine(place, nth).armed():
                    work()
                assert not [thread for thread in threading.enumerate() if thread.name == "gemini-memory-file"]
    finally:
        signal.signal(signal.SIGINT, before)


def test_without_room_for_threads_the_caller_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    done: list[int] = []
    with Team(list, count=2) as team:
        for number in range(5):
            team.do(task(done, number))
    assert done == list(range(5))
