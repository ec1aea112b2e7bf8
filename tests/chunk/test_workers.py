import gc
import os
import threading
from concurrent.futures import Future

import pytest

from gemini.chunk import close_in_background, start_workers, workers
from gemini.errors import LimitError
from gemini.process_wide import compute_on_this_thread


def test_all_threads_are_there_before_the_first_task() -> None:
    pool = start_workers(3, "test")
    assert sum(t.name.startswith("gemini-memory-test") for t in threading.enumerate()) == 3
    assert pool.submit(lambda: 7).result(10) == 7
    pool.shutdown()


def test_a_refused_thread_is_a_limit_and_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = threading.Thread.start, []

    def refuse_the_second(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse_the_second)
    with pytest.raises(LimitError, match=r"raise RLIMIT_NPROC .* by 64 or more"):
        start_workers(2, "test")
    started[0].join(10)
    assert not started[0].is_alive()


def test_a_task_whose_submission_failed_is_not_done(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, done = start_workers(1, "test"), list[str]()

    def fail() -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(pool, "_adjust_thread_count", fail)  # the task is in the queue then
        with pytest.raises(MemoryError):
            pool.submit(done.append, "lost")
    pool.submit(done.append, "kept").result(10)
    assert done == ["kept"]
    pool.shutdown()


def test_torch_keeps_its_number_of_threads_where_none_could_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = [4]

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError):
        compute_on_this_thread(lambda: numbers[-1], numbers.append)
    assert numbers == [4, 1, 4]


# -- the end, asked for by a finalizer


@pytest.mark.timeout(60)
def test_what_ends_has_ended_when_the_call_returns_in_the_order_asked_for() -> None:
    pool = start_workers(2, "test-end")
    done: list[str] = []
    pool.submit(done.append, "task")
    close_in_background(pool.shutdown)
    close_in_background(lambda: done.append("after"))
    assert done == ["task", "after"]
    assert not any(t.name.startswith("gemini-memory-test-end") for t in threading.enumerate())


@pytest.mark.timeout(60)
def test_what_the_end_itself_asks_for_is_done_with_it_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "END_SECONDS", 30.0)
    start_workers(1, "test-nested").shutdown()
    done: list[str] = []

    def end() -> None:
        close_in_background(lambda: done.append("inner"))
        done.append("outer")

    close_in_background(end)
    assert done == ["outer", "inner"]


@pytest.mark.timeout(60)
def test_a_thread_may_ask_for_its_own_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "END_SECONDS", 0.1)
    pool = start_workers(1, "test-own")
    pool.submit(close_in_background, pool.shutdown).result(30)
    over = threading.Event()
    close_in_background(over.set)  # behind the shutdown
    assert over.wait(30)


@pytest.mark.timeout(60)
@pytest.mark.skipif(not hasattr(threading, "_shutdown_locks_lock"), reason="this Python has no such lock")
def test_the_end_may_be_asked_for_within_threading_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    # A collection in the start of a thread holds this lock, and joining a thread takes it.
    monkeypatch.setattr(workers, "END_SECONDS", 0.1)
    pool = start_workers(1, "test-lock")
    with threading._shutdown_locks_lock:
        close_in_background(pool.shutdown)
    over = threading.Event()
    close_in_background(over.set)
    assert over.wait(30)
    assert not any(t.name.startswith("gemini-memory-test-lock") for t in threading.enumerate())


@pytest.mark.timeout(60)
def test_one_that_ends_late_does_not_make_others_wait_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "END_SECONDS", 0.1)
    start_workers(1, "test-late").shutdown()
    may_end, waits = threading.Event(), []
    wait = threading.Event.wait

    def counting(event: threading.Event, timeout: float | None = None) -> bool:
        if timeout == 0.1:
            waits.append(event)
        return wait(event, timeout)

    monkeypatch.setattr(threading.Event, "wait", counting)
    for work in (lambda: may_end.wait(30), *[int] * 100):
        close_in_background(work)
    assert len(waits) == 1
    may_end.set()
    for _ in range(1000):  # once it has caught up, a call waits again
        over = threading.Event()
        close_in_background(over.set)
        assert wait(over, 30)
        if len(waits) > 1:
            break
    assert len(waits) > 1


@pytest.mark.timeout(60)
def test_an_error_on_the_way_is_logged_and_the_next_one_ends(caplog: pytest.LogCaptureFixture) -> None:
    start_workers(1, "test-error").shutdown()
    over = threading.Event()
    close_in_background(lambda: 1 / 0)
    close_in_background(over.set)
    assert over.is_set() and "closing failed" in caplog.text


@pytest.mark.timeout(60)
def test_a_fork_has_nothing_to_end_and_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    start_workers(1, "test-fork").shutdown()
    pid = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: pid + 1)
    close_in_background(lambda: pytest.fail("these threads are not ours"))


@pytest.mark.timeout(60)
def test_a_thread_outlives_what_goes_wrong_around_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, told = start_workers(1, "test"), Future.set_result

    def no_memory(future: Future[int], result: int) -> None:
        monkeypatch.setattr(Future, "set_result", told)
        raise MemoryError

    monkeypatch.setattr(Future, "set_result", no_memory)
    with pytest.raises(MemoryError):
        pool.submit(lambda: 1).result(20)
    assert pool.submit(lambda: 2).result(20) == 2
    pool.shutdown()


@pytest.mark.timeout(60)
def test_who_waits_hears_of_a_result_that_was_set_and_not_told() -> None:
    pool, may_end = start_workers(1, "test"), threading.Event()

    class Deaf(threading.Condition):
        """Finds no memory to wake the others, once."""

        def notify_all(self) -> None:
            if not calls:
                calls.append(1)
                raise MemoryError
            super().notify_all()

    calls: list[int] = []
    future = pool.submit(may_end.wait, 20)
    future._condition = Deaf()
    results: list[bool] = []
    waiter = threading.Thread(target=lambda: results.append(future.result(20)))
    waiter.start()
    may_end.set()
    waiter.join(20)
    assert results == [True] and calls == [1]
    assert pool.submit(lambda: 2).result(20) == 2
    pool.shutdown()


@pytest.mark.timeout(60)
def test_threads_end_with_their_pool() -> None:
    pool = start_workers(2, "test-gone")
    del pool
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("gemini-memory-test-gone"):
            thread.join(20)
            assert not thread.is_alive()
