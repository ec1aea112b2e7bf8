"""Cutting a buffer and sharing it between threads."""

import heapq
import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemini.nn.optimizer.kernels import kernel_pool
from gemini.nn.optimizer.kernels.kernel_pool import KernelPool, default_pool, slices
from gemini.process_wide import PerProcess


@given(numel=st.integers(0, 1 << 36), threads=st.integers(1, 256))
def test_slices_cover_a_buffer_in_whole_cache_lines_and_end_at_the_same_time(numel: int, threads: int) -> None:
    cut = slices(numel, threads)
    assert [piece.start for piece in cut] == [0, *(piece.stop for piece in cut[:-1])][: len(cut)]
    assert sum(piece.stop - piece.start for piece in cut) == numel
    assert all(piece.start % 64 == 0 for piece in cut)
    assert len(cut) <= 64 * threads
    # A free thread takes the next piece. None works for longer than the others together need for what is left.
    busy = [0] * threads
    for piece in cut:
        heapq.heapreplace(busy, busy[0] + piece.stop - piece.start)
    assert max(busy) - min(busy) < 1 << 17


def test_a_slow_thread_holds_the_others_up_by_little() -> None:
    numel, paces = 1 << 25, [1, 1, 3, 2]
    ends = [(0, thread) for thread in range(4)]
    for piece in slices(numel, 4):
        end, thread = heapq.heappop(ends)
        heapq.heappush(ends, (end + (piece.stop - piece.start) * paces[thread], thread))
    ideal = numel / sum(1 / pace for pace in paces)
    assert max(ends)[0] <= 1.03 * ideal


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("numel", [0, 1, 63, 1 << 16, (1 << 17) + 1, (1 << 22) + 3])
def test_every_element_is_visited_once(threads: int, numel: int) -> None:
    pool, ranges, lock = KernelPool(threads), [], threading.Lock()

    def work(piece: slice) -> None:
        with lock:
            ranges.append((piece.start, piece.stop))

    pool.run(work, pool.cut(numel))
    pool.close()
    position = 0
    for start, stop in sorted(ranges):
        assert start == position < stop
        position = stop
    assert position == numel


def test_an_error_comes_out_after_every_slice_has_ended() -> None:
    pool, running, lock = KernelPool(4), 0, threading.Lock()

    def work(piece: slice) -> None:
        nonlocal running
        with lock:
            running += 1
        try:
            if piece.start > 0:
                raise RuntimeError("broken slice")
        finally:
            with lock:
                running -= 1

    with pytest.raises(RuntimeError, match="broken slice"):
        pool.run(work, pool.cut(1 << 23))
    assert running == 0
    pool.close()


def test_a_pool_without_threads_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        KernelPool(0)


def test_a_forked_process_makes_its_own_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    parent = default_pool()
    assert default_pool() is parent
    monkeypatch.setattr(os, "getpid", lambda: -1)
    child = default_pool()
    assert child is not parent
    monkeypatch.undo()
    assert default_pool() is not child


def test_where_the_system_refuses_a_thread_those_there_are_do_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = threading.Thread.start, []

    def refuse_the_third(thread: threading.Thread) -> None:
        if thread.name.startswith("gemini-adam"):
            if len(started) == 2:
                raise RuntimeError("can't start new thread")
            started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse_the_third)
    pool = KernelPool(8)
    assert pool.threads == 3
    seen: list[slice] = []
    pool.run(seen.append, pool.cut(1 << 23))
    assert sum(piece.stop - piece.start for piece in seen) == 1 << 23
    assert len(started) == 2  # all threads exist before the first update
    pool.close()


def test_many_threads_that_ask_first_at_once_get_one_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_pool, "_of_process", PerProcess(lambda: KernelPool(2)))
    found: list[KernelPool] = []
    askers = [threading.Thread(target=lambda: found.append(default_pool())) for _ in range(8)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join(30)
    assert len(found) == 8
    assert len(set(map(id, found))) == 1
    found[0].close()
