"""How much of its rate a Python loop on the main thread keeps while an update runs in the background."""

import threading
import time
from collections.abc import Callable

from gemini.nn.optimizer.kernels.kernel_pool import KernelPool

SECONDS = 1.0


def kept_rate(update: Callable[[KernelPool], object], threads: int, rounds: int = 5) -> float:
    """The loop's rate beside the update, divided by its rate alone: the median over the rounds.

    Parameters
    ----------
    update
        One update, on the threads of the pool given; repeated for as long as the loop spins.
    threads
        How many it has.
    """
    pool = KernelPool(threads)
    kept = []
    for _ in range(rounds):
        alone = _spin()
        stop = threading.Event()

        def work(stop: threading.Event = stop) -> None:
            while not stop.is_set():
                update(pool)

        background = threading.Thread(target=work)
        background.start()
        beside = _spin()
        stop.set()
        background.join()
        kept.append(beside / alone)
    pool.close()
    return sorted(kept)[len(kept) // 2]


def _spin() -> float:
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < SECONDS:
        count += 1
    return count / SECONDS
