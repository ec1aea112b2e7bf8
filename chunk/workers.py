"""Worker threads that exist before the first task."""

import threading
from concurrent.futures import ThreadPoolExecutor

from gemini.errors import OutOfMemory

START_SECONDS = 30.0


def start_workers(count: int, name: str) -> ThreadPoolExecutor:
    """A pool whose threads have all been started.

    The standard pool starts a thread when a task finds none idle: in the middle of training, where a tight memory limit
    may refuse the thread its stack. Here that is an error before anything has been changed.

    Raises
    ------
    OutOfMemory
        If the system refuses a thread.
    """
    pool = ThreadPoolExecutor(count, thread_name_prefix=f"gemini-memory-{name}")
    here = threading.Barrier(count + 1)  # each task holds its thread until all are there
    try:
        for _ in range(count):
            pool.submit(here.wait, START_SECONDS)
        here.wait(START_SECONDS)
    except RuntimeError as error:
        here.abort()
        pool.shutdown(wait=False, cancel_futures=True)
        raise OutOfMemory(
            f"host tier out of memory. The system refuses a worker thread ({error}); "
            "lower host_memory, so that more of the limit is left for stacks and activations"
        ) from error
    return pool
