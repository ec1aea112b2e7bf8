import threading

import pytest

from gemini.chunk import start_workers
from gemini.errors import OutOfMemory


def test_all_threads_are_there_before_the_first_task() -> None:
    pool = start_workers(3, "test")
    assert sum(t.name.startswith("gemini-memory-test") for t in threading.enumerate()) == 3
    assert pool.submit(lambda: 7).result(10) == 7
    pool.shutdown()


def test_a_refused_thread_is_out_of_memory_and_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = threading.Thread.start, []

    def refuse_the_second(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse_the_second)
    with pytest.raises(OutOfMemory, match="lower host_memory"):
        start_workers(2, "test")
    started[0].join(10)
    assert not started[0].is_alive()
